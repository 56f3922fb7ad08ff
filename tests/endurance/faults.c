// SPDX-License-Identifier: Apache-2.0
// Makes the n-th call that changes files below a folder fail, and tells what it was. Loaded before libc (LD_PRELOAD).
// Counted are: opening to write, write, pwrite, writev, fwrite, ftruncate, fsync, fdatasync, rename, mkdir and link.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long countdown, calls;  // 0: nothing fails
static int error;
static char failed[PATH_MAX + 64];

// Arms it: the n-th call from here on fails with an error number; 0 counts only.
void faults_arm(const char* folder, long n, int number) {
    strncpy(root, folder, sizeof(root) - 1);
    countdown = n, error = number, calls = 0, failed[0] = 0;
}
long faults_calls(void) { return calls; }
const char* faults_failed(void) { return failed; }

static int below(const char* path) {
    if (!root[0] || !path) return 0;
    if (path[0] == '/') return strncmp(path, root, strlen(root)) == 0;
    char here[PATH_MAX];
    return getcwd(here, sizeof(here)) && strncmp(here, root, strlen(root)) == 0;
}

static int of_descriptor(int fd) {
    if (!root[0]) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t size = readlink(link, path, sizeof(path) - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

static int fails(int counts, const char* what, const char* path) {
    if (!counts) return 0;
    ++calls;
    if (countdown == 0 || calls != countdown) return 0;
    snprintf(failed, sizeof(failed), "%s %s", what, path ? path : "");
    errno = error;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define BY_DESCRIPTOR(result, name, parameters, arguments)                  \
    result name parameters {                                                \
        if (fails(of_descriptor(fd), #name, 0)) return -1;                  \
        return REAL(name) arguments;                                        \
    }
BY_DESCRIPTOR(ssize_t, write, (int fd, const void* data, size_t size), (fd, data, size))
BY_DESCRIPTOR(ssize_t, pwrite, (int fd, const void* data, size_t size, off_t at), (fd, data, size, at))
BY_DESCRIPTOR(ssize_t, pwrite64, (int fd, const void* data, size_t size, off64_t at), (fd, data, size, at))
BY_DESCRIPTOR(ssize_t, writev, (int fd, const struct iovec* parts, int count), (fd, parts, count))
BY_DESCRIPTOR(int, ftruncate, (int fd, off_t size), (fd, size))
BY_DESCRIPTOR(int, ftruncate64, (int fd, off64_t size), (fd, size))
BY_DESCRIPTOR(int, fsync, (int fd), (fd))
BY_DESCRIPTOR(int, fdatasync, (int fd), (fd))

size_t fwrite(const void* data, size_t size, size_t count, FILE* file) {
    if (fails(of_descriptor(fileno(file)), "fwrite", 0)) return 0;
    return REAL(fwrite)(data, size, count, file);
}

#define BY_PATH(name, parameters, path, arguments)                          \
    int name parameters {                                                   \
        if (fails(below(path), #name, path)) return -1;                     \
        return REAL(name) arguments;                                        \
    }
BY_PATH(rename, (const char* from, const char* to), to, (from, to))
BY_PATH(renameat, (int a, const char* from, int b, const char* to), to, (a, from, b, to))
BY_PATH(renameat2, (int a, const char* from, int b, const char* to, unsigned flags), to, (a, from, b, to, flags))
BY_PATH(mkdir, (const char* path, mode_t mode), path, (path, mode))
BY_PATH(mkdirat, (int at, const char* path, mode_t mode), path, (at, path, mode))
BY_PATH(link, (const char* from, const char* to), to, (from, to))

static int writes(int flags) { return (flags & (O_WRONLY | O_RDWR | O_CREAT)) != 0; }

#define OPENS(name, parameters, last, arguments)                            \
    int name parameters {                                                   \
        va_list more;                                                       \
        va_start(more, last);                                               \
        const mode_t mode = (flags & O_CREAT) ? va_arg(more, mode_t) : 0;   \
        va_end(more);                                                       \
        if (fails(writes(flags) && below(path), #name, path)) return -1;    \
        return REAL(name) arguments;                                        \
    }
OPENS(open, (const char* path, int flags, ...), flags, (path, flags, mode))
OPENS(open64, (const char* path, int flags, ...), flags, (path, flags, mode))
OPENS(openat, (int at, const char* path, int flags, ...), flags, (at, path, flags, mode))
OPENS(openat64, (int at, const char* path, int flags, ...), flags, (at, path, flags, mode))

#define FOPENS(name)                                                        \
    FILE* name(const char* path, const char* mode) {                        \
        if (fails(strpbrk(mode, "wa+") && below(path), #name, path)) return NULL; \
        return REAL(name)(path, mode);                                      \
    }
FOPENS(fopen)
FOPENS(fopen64)
