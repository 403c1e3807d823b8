"""What the guest image contains, as data.

The packages named here are what a user asked for; their dependencies are resolved by apt itself
(:mod:`luminaguard.images.lock`). What a closure drags in without being needed in a machine that
has no package manager, no network and no second user is left out by name, with its reason.
"""

from __future__ import annotations

__all__ = [
    "DROPPED_PACKAGES",
    "DROPPED_PREFIXES",
    "INITRAMFS_PACKAGES",
    "KERNEL_MODULES",
    "KERNEL_PACKAGES",
    "KERNEL_SOURCES",
    "NEVER_NEEDED",
    "ROOT_PACKAGES",
    "VSOCK_MODULES",
]

ROOT_PACKAGES = (
    "base-files", "bash", "bzip2", "ca-certificates", "coreutils", "dash", "debianutils",
    "diffutils", "file", "findutils", "gawk", "git", "grep", "gzip", "jq", "libc-bin",
    "ncurses-base", "patch", "python3", "sed", "tar", "tzdata", "xz-utils",
)  # fmt: skip

INITRAMFS_PACKAGES = ("busybox-static",)

KERNEL_PACKAGES = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}
"""The metapackage whose dependency is the signed kernel, by the ``ID`` of os-release."""

KERNEL_SOURCES = "linux-source"
"""The metapackage of the distribution's kernel sources, patches included."""

KERNEL_MODULES = (
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "squashfs",
    "overlay",
    # Whose the files of a workspace are (guest/ownership.py).
    "dm_mod",
    "brd",
)
"""Modules that the initramfs loads, with what they depend on; one built in has no file to load."""

VSOCK_MODULES = ("vmw_vsock_virtio_transport", "virtio_balloon")
"""Loaded in addition where the hypervisor offers vsock and a balloon (see the initramfs)."""

DROPPED_PACKAGES = {
    # A package manager and its configuration system: the root file system is never changed.
    "dpkg", "debconf", "init-system-helpers", "usrmerge", "gcc-12-base", "gcc-14-base",
    # Perl: only git's optional helpers use it, and they are dropped with it.
    "perl", "perl-base", "perl-modules-5.36", "perl-modules-5.38", "perl-modules-5.40",
    "libperl5.36", "libperl5.38t64", "libperl5.40",
    "liberror-perl", "libfile-find-rule-perl", "libnumber-compare-perl", "libtext-glob-perl",
    "libgdbm6", "libgdbm-compat4", "libgdbm6t64", "libgdbm-compat4t64",
    # git over the network: there is no network device.
    "libcurl3-gnutls", "libcurl3t64-gnutls", "libbrotli1", "libldap-2.5-0", "libldap2",
    "libsasl2-2", "libsasl2-modules-db", "libnghttp2-14", "libnghttp3-9", "libngtcp2-16",
    "libngtcp2-crypto-gnutls8", "libpsl5", "libpsl5t64", "librtmp1", "libssh2-1", "libssh2-1t64",
    "libgnutls30", "libgnutls30t64", "libnettle8", "libnettle8t64", "libhogweed6",
    "libhogweed6t64", "libp11-kit0", "libtasn1-6", "libidn2-0", "libunistring2", "libunistring5",
    # Documentation and the command-line tool that only a maintainer script runs.
    "git-man", "media-types", "openssl", "openssl-provider-legacy",
}  # fmt: skip

NEVER_NEEDED = frozenset({"gcc-12-base", "gcc-14-base", "media-types", "libc6", "libgcc-s1", "zlib1g"})
"""Of what a layer is made: without a file that is used, or what every image has."""

DROPPED_PREFIXES = (
    "usr/share/doc/", "usr/share/man/", "usr/share/info/", "usr/share/locale/",
    "usr/share/lintian/", "usr/share/bug/", "usr/share/bash-completion/", "usr/share/perl5/",
    "usr/share/menu/", "usr/share/pixmaps/", "usr/share/applications/", "usr/share/icons/",
    "usr/share/doc-base/", "usr/share/common-licenses/", "usr/share/base-files/",
    "usr/share/gitweb/", "usr/share/initramfs-tools/", "usr/share/debianutils/",
    "usr/share/python3/", "usr/lib/systemd/", "usr/lib/init/", "usr/lib/mime/",
    "usr/lib/x86_64-linux-gnu/gconv/", "usr/lib/x86_64-linux-gnu/audit/",
    *(f"usr/lib/python3.{minor}/lib-dynload/{name}" for minor in (11, 12, 13) for name in ("_test", "_xxtest", "xx")),
    "usr/lib/python3.11/lib2to3/", "usr/lib/python3.11/__phello__/",
    "usr/lib/python3/dist-packages/lsb_release", "usr/lib/git-core/git-remote-http",
    "usr/lib/git-core/git-remote-ftp", "usr/lib/git-core/git-http-", "usr/lib/git-core/git-imap-",
    "usr/lib/git-core/git-add--interactive", "usr/lib/git-core/git-svn",
    "usr/lib/git-core/git-send-email", "usr/lib/git-core/git-cvs", "usr/lib/git-core/git-archimport",
    "usr/lib/git-core/git-instaweb", "usr/lib/git-core/git-daemon", "usr/lib/git-core/scalar",
    "usr/bin/git-cvsserver", "usr/bin/scalar",
    "usr/sbin/", "usr/bin/pydoc", "usr/bin/pygettext", "usr/bin/py3", "usr/bin/pdb",
    "usr/bin/chfn", "usr/bin/chsh", "usr/bin/savelog", "usr/bin/ischroot", "usr/bin/add-shell",
    "usr/bin/remove-shell", "usr/bin/pldd", "usr/bin/catchsegv", "usr/bin/localedef",
    "var/lib/dpkg/", "var/cache/", "var/backups/", "var/mail/", "var/spool/", "boot/", "media/",
    "home/", "srv/", "mnt/", "opt/", "etc/cron", "etc/dpkg/", "etc/apt/", "etc/update-motd.d/",
    "etc/systemd/", "etc/init.d/", "etc/default/", "etc/skel/", "etc/kernel/", "usr/src/",
    "usr/include/", "usr/games/", "usr/local/",
)  # fmt: skip
