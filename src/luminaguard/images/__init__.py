"""Build, verify and find guest images: kernel, initramfs, read-only root file system, manifest."""
