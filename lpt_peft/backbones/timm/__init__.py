"""timm's plain ViTs as backbones."""
