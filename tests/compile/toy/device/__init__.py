"""Device modules of the toy templates."""
