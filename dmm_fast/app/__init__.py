"""The page of ``dmm-fast app``: first masks, runs, corrections and exports, in a browser on this machine."""
