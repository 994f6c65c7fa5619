"""Everything about folders and commands: config.json, weights, side files, errors, options."""
