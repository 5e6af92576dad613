"""Random boxes of slides: ``Slide`` and what lies behind it."""
