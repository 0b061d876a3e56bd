"""How the figures of presets were fitted, one module a family of models; each prints what stands in the preset."""
