"""Device modules: the parts of a kernel that compute; templates bind them to constants."""
