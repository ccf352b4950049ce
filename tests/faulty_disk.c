/*
 * A disk that fails when told to, for LD_PRELOAD: as soon as the file FAULTY_DISK_TRIGGER is
 * there, syncs of files below FAULTY_DISK_DIR whose names end in .seg fail with EIO, and
 * writes too unless the trigger says "sync". Sees libc's functions, no raw system calls.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static const char SUFFIX[] = ".seg";

/* Whether a call on this file is to fail; errno is EIO then, and left alone otherwise. */
static int fails(int fd, int is_sync)
{
	const char *dir = getenv("FAULTY_DISK_DIR"), *trigger = getenv("FAULTY_DISK_TRIGGER");
	size_t suffix = sizeof SUFFIX - 1;
	char link[64], path[PATH_MAX], what[8] = "";
	int saved = errno, file;
	ssize_t length;

	if (!dir || !trigger)
		return 0;
	file = open(trigger, O_RDONLY | O_CLOEXEC);
	if (file < 0) {
		errno = saved;
		return 0;
	}
	if (read(file, what, sizeof what - 1) < 0)
		what[0] = 0;
	close(file);
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	length = readlink(link, path, sizeof path);
	errno = saved;
	if (length < (ssize_t)suffix || memcmp(path + length - suffix, SUFFIX, suffix))
		return 0;
	if ((size_t)length <= strlen(dir) || memcmp(path, dir, strlen(dir)) || path[strlen(dir)] != '/')
		return 0;
	if (!is_sync && !strncmp(what, "sync", 4))
		return 0;
	errno = EIO;
	return 1;
}

/* A function that fails when it should, and is libc's otherwise. */
#define FAULTY(type, name, is_sync, parameters, arguments)           \
	type name parameters                                         \
	{                                                            \
		static type(*real) parameters;                       \
		if (!real)                                           \
			*(void **)&real = dlsym(RTLD_NEXT, #name);   \
		return fails(fd, is_sync) ? -1 : real arguments;     \
	}

FAULTY(int, fsync, 1, (int fd), (fd))
FAULTY(int, fdatasync, 1, (int fd), (fd))
FAULTY(int, sync_file_range, 1, (int fd, off64_t at, off64_t n, unsigned int how), (fd, at, n, how))
FAULTY(ssize_t, write, 0, (int fd, const void *from, size_t n), (fd, from, n))
FAULTY(ssize_t, writev, 0, (int fd, const struct iovec *parts, int n), (fd, parts, n))
FAULTY(ssize_t, pwrite, 0, (int fd, const void *from, size_t n, off_t at), (fd, from, n, at))
FAULTY(ssize_t, pwrite64, 0, (int fd, const void *from, size_t n, off64_t at), (fd, from, n, at))
FAULTY(ssize_t, pwritev, 0, (int fd, const struct iovec *parts, int n, off_t at), (fd, parts, n, at))
FAULTY(ssize_t, pwritev64, 0, (int fd, const struct iovec *parts, int n, off64_t at), (fd, parts, n, at))
FAULTY(ssize_t, pwritev2, 0, (int fd, const struct iovec *parts, int n, off_t at, int how),
       (fd, parts, n, at, how))
FAULTY(ssize_t, pwritev64v2, 0, (int fd, const struct iovec *parts, int n, off64_t at, int how),
       (fd, parts, n, at, how))
