"""The bundled tiny backbone and the digits run of `lpt-peft demo`. Needs the extra `lpt_peft[demo]`."""

from lpt_peft.backbones.bundled.glyph_vit import glyph_vit

__all__ = ["glyph_vit"]
