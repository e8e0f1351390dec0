"""The laboratory: train, compare and export LNFree variants."""
