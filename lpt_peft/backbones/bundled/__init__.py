"""The backbone that the package ships: `glyph_vit`, its weights and its configuration."""

NAME, TAG = "glyph_vit", "dejavu"
