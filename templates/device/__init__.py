"""Device functions shared by the kernel templates."""
