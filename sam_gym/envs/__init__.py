"""The environments, registered by name on `import sam_gym`."""
