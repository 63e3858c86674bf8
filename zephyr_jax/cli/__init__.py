"""The commands, one file each: flags to one call of the package."""
