"""Parts of the windowed backward: windows and documents, the store of keys and values, attention, the two passes."""
