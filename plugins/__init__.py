"""Built-in plugins: one file each with its configuration, its policy and its hook."""
