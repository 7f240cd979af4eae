"""torch modules that mmsearch adds to open_clip's."""
