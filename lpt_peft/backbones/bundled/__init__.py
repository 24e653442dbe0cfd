"""The backbone that the package ships: `glyph_vit`, its weights and its configuration."""
