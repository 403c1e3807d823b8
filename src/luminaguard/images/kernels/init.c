/*
 * The first program of a machine with a kernel that is built here: it mounts the root and becomes the supervisor.
 *
 * What a shell does for other kernels (initramfs.py) takes 2 MB of initramfs, which an emulated machine reads byte by
 * byte, and a process for each step. Here all drivers are in the kernel, and the root is always the device of dm-verity.
 * Whatever fails ends the machine. Built with the kernel's own nolibc (tools/include/nolibc).
 */

#include <linux/mount.h>

#define FOLDER "/run/luminaguard"
#define SAFE (MS_NOSUID | MS_NODEV)
#define MOST 4096

static char line[MOST + 1], words[MOST + 1];
static char *argv[32], *envp[] = {"LC_ALL=C", "TZ=/dev/null", NULL};

static int must(int result)
{
	if (result < 0)
		reboot(LINUX_REBOOT_CMD_POWER_OFF);
	return result;
}

static int take(const char *path, char *into)
{
	int fd = must(open(path, O_RDONLY, 0)), size = must(read(fd, into, MOST));

	close(fd);
	return size;
}

/* Whether a word is on the kernel's command line. */
static int given(const char *word)
{
	int size = strlen(word);
	char *at;

	for (at = line; *at; at++)
		if ((at == line || at[-1] == ' ') && !strncmp(at, word, size) && (at[size] == ' ' || at[size] == '\n' || !at[size]))
			return 1;
	return 0;
}

int main(void)
{
	int size, start = 0, count = 0;

	must(mount("dev", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, NULL));
	must(mount("proc", "/proc", "proc", SAFE | MS_NOEXEC, NULL));
	take("/proc/cmdline", line);
	must(umount2("/proc", 0));
	must(mount("/dev/dm-0", "/root", "squashfs", SAFE | MS_RDONLY, NULL));
	must(mount("tmpfs", "/root/run", "tmpfs", SAFE | MS_NOEXEC, "mode=755,size=4m,nr_inodes=1024"));
	must(mkdir("/root" FOLDER, 0700));
	must(mkdir("/root" FOLDER "/luminaguard", 0755));
	must(mount("/luminaguard", "/root" FOLDER "/luminaguard", NULL, MS_BIND, NULL));
	must(mount(NULL, "/root" FOLDER "/luminaguard", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | SAFE | MS_NOEXEC, NULL));
	must(mount("/dev", "/root/dev", NULL, MS_MOVE, NULL));
	/* Its words, each with a zero behind it. */
	size = take(given("lumina.runtime") ? "/supervisor.container" : "/supervisor", words);
	for (; start < size && count < 31; start += strlen(words + start) + 1)
		argv[count++] = words + start;
	must(chdir("/root"));
	must(mount(".", "/", NULL, MS_MOVE, NULL));
	must(chroot("."));
	must(chdir("/"));
	must(execve(argv[0], argv, envp));
	return 1;
}
