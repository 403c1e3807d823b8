"""The QEMU ``microvm`` backend: works everywhere, with KVM where it really works."""
