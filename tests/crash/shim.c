/* What a process does to the files of one folder: counted, killed at, failed, or recorded.
 *
 * Preloaded (LD_PRELOAD) into a program, this stands between it and libc for the calls that change
 * files. FAULT_DIR is the folder; calls on other files pass. FAULT_AT numbers one of the calls:
 *
 *   FAULT_DO=before, after   SIGKILL before or after that call
 *   FAULT_DO=fail            that call fails with errno FAULT_ERRNO, and with FAULT_STICKY all
 *                            later ones that write, sync or rename
 *   FAULT_DO=record          every call goes into FAULT_LOG with what it wrote (faults.py reads it)
 *
 * At the end the number of calls is written to FAULT_COUNT, if that is set. Writes of stdio's own
 * (as FAISS makes them) do not pass through here; a recorded fsync holds the whole file instead.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OFF, BEFORE, AFTER, FAIL, RECORD };

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static int mode = OFF, sticky, fault_errno = EIO, log_fd = -1;
static long at, calls;
static char folder[PATH_MAX];
static size_t folder_length;
static pid_t owner;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void start(void) {
    const char *dir = getenv("FAULT_DIR"), *what = getenv("FAULT_DO");
    if (!dir || !what) return;
    snprintf(folder, sizeof folder, "%s/", dir);
    folder_length = strlen(folder);
    mode = !strcmp(what, "before") ? BEFORE : !strcmp(what, "after") ? AFTER
         : !strcmp(what, "fail") ? FAIL : !strcmp(what, "record") ? RECORD : OFF;
    at = getenv("FAULT_AT") ? atol(getenv("FAULT_AT")) : 0;
    sticky = getenv("FAULT_STICKY") != NULL;
    if (getenv("FAULT_ERRNO")) fault_errno = atoi(getenv("FAULT_ERRNO"));
    if (mode == RECORD)
        log_fd = REAL(open)(getenv("FAULT_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    owner = getpid();
}

static void report(void) {
    const char *path = getenv("FAULT_COUNT");
    if (!path || mode == OFF || !calls) return;
    char text[32];
    int length = snprintf(text, sizeof text, "%ld", calls);
    int fd = REAL(open)(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd >= 0) {
        if (REAL(write)(fd, text, length) != length) abort();
        close(fd);
    }
}

__attribute__((destructor)) static void finish(void) { report(); }

void _exit(int code) {
    report();
    REAL(_exit)(code);
    abort();
}

/* The path of an open file if it lies in the folder. */
static int is_ours(int fd, char path[PATH_MAX]) {
    char link[64];
    if (mode == OFF) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return !strncmp(path, folder, folder_length) || !strncmp(path, folder, folder_length - 1);
}

static int is_our_path(const char *path) {
    return mode != OFF && path && !strncmp(path, folder, folder_length);
}

static long begin(void) {
    pthread_mutex_lock(&lock);
    long number = ++calls;
    if (mode == BEFORE && number == at) kill(getpid(), SIGKILL);
    return number;
}

static int fails(long number) {
    return mode == FAIL && (number == at || (sticky && number >= at));
}

static void end(long number) {
    if (mode == AFTER && number == at) kill(getpid(), SIGKILL);
    pthread_mutex_unlock(&lock);
}

static void put(const void *from, size_t size) {
    while (size) {
        ssize_t done = REAL(write)(log_fd, from, size);
        if (done < 0) abort();
        from = (const char *)from + done;
        size -= done;
    }
}

static void record(char op, const char *path, const char *other, int64_t offset,
                   const void *data, int64_t size) {
    if (mode != RECORD) return;
    int32_t first = strlen(path), second = other ? strlen(other) : 0;
    put(&op, 1);
    put(&first, 4);
    put(&second, 4);
    put(&offset, 8);
    put(&size, 8);
    put(path, first);
    if (second) put(other, second);
    if (size) put(data, size);
}

static void record_content(int fd, const char *path) {
    struct stat status;
    if (mode != RECORD || fstat(fd, &status)) return;
    if (S_ISDIR(status.st_mode)) {
        record('D', path, NULL, 0, NULL, 0);
        return;
    }
    char *content = malloc(status.st_size + 1);
    int again = REAL(open)(path, O_RDONLY);
    int64_t size = 0;
    while (again >= 0 && size < status.st_size) {
        ssize_t got = pread(again, content + size, status.st_size - size, size);
        if (got <= 0) break;
        size += got;
    }
    if (again >= 0) close(again);
    record('S', path, NULL, 0, content, size);
    free(content);
}

#define SYNC(name)                                                   \
    int name(int fd) {                                               \
        char path[PATH_MAX];                                         \
        if (!is_ours(fd, path)) return REAL(name)(fd);               \
        long number = begin();                                       \
        int result = -1;                                             \
        if (fails(number)) errno = fault_errno;                      \
        else if (!(result = REAL(name)(fd))) record_content(fd, path); \
        end(number);                                                 \
        return result;                                               \
    }
SYNC(fsync)
SYNC(fdatasync)

int rename(const char *from, const char *to) {
    if (!is_our_path(from) && !is_our_path(to)) return REAL(rename)(from, to);
    long number = begin();
    int result = -1;
    if (fails(number)) errno = fault_errno;
    else if (!(result = REAL(rename)(from, to))) record('R', from, to, 0, NULL, 0);
    end(number);
    return result;
}

int unlink(const char *path) {
    if (!is_our_path(path)) return REAL(unlink)(path);
    if (strstr(path, "/mark:")) {  /* a word from the program, not a file */
        pthread_mutex_lock(&lock);
        record('K', path, NULL, 0, NULL, 0);
        pthread_mutex_unlock(&lock);
        errno = ENOENT;
        return -1;
    }
    long number = begin();
    int result = REAL(unlink)(path), saved = errno;
    if (!result) record('U', path, NULL, 0, NULL, 0);
    end(number);
    errno = saved;
    return result;
}

int mkdir(const char *path, mode_t permissions) {
    if (!is_our_path(path)) return REAL(mkdir)(path, permissions);
    long number = begin();
    int result = -1;
    if (fails(number)) errno = fault_errno;
    else if (!(result = REAL(mkdir)(path, permissions))) record('M', path, NULL, 0, NULL, 0);
    end(number);
    return result;
}

#define TRUNCATE(name, type)                                                \
    int name(int fd, type length) {                                         \
        char path[PATH_MAX];                                                \
        if (!is_ours(fd, path)) return REAL(name)(fd, length);              \
        long number = begin();                                              \
        int result = -1;                                                    \
        if (fails(number)) errno = fault_errno;                             \
        else if (!(result = REAL(name)(fd, length)))                        \
            record('T', path, NULL, length, NULL, 0);                       \
        end(number);                                                        \
        return result;                                                      \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define PWRITE(name, type)                                                          \
    ssize_t name(int fd, const void *data, size_t size, type offset) {              \
        char path[PATH_MAX];                                                        \
        if (!is_ours(fd, path)) return REAL(name)(fd, data, size, offset);          \
        long number = begin();                                                      \
        ssize_t result = -1;                                                        \
        if (fails(number)) errno = fault_errno;                                     \
        else if ((result = REAL(name)(fd, data, size, offset)) > 0)                 \
            record('W', path, NULL, offset, data, result);                          \
        end(number);                                                                \
        return result;                                                              \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    if (!is_ours(fd, path)) return REAL(write)(fd, data, size);
    long number = begin();
    ssize_t result = -1;
    if (fails(number)) errno = fault_errno;
    else {
        off_t place = lseek(fd, 0, SEEK_CUR);
        if (fcntl(fd, F_GETFL) & O_APPEND) place = lseek(fd, 0, SEEK_END);
        if ((result = REAL(write)(fd, data, size)) > 0)
            record('W', path, NULL, place, data, result);
    }
    end(number);
    return result;
}

#define OPEN(name)                                                                 \
    int name(const char *path, int flags, ...) {                                   \
        va_list rest;                                                              \
        va_start(rest, flags);                                                     \
        mode_t permissions = flags & O_CREAT ? va_arg(rest, mode_t) : 0;           \
        va_end(rest);                                                              \
        if (!is_our_path(path) || !(flags & (O_CREAT | O_TRUNC)))                  \
            return REAL(name)(path, flags, permissions);                           \
        pthread_mutex_lock(&lock);                                                 \
        int result;                                                                \
        if (mode == FAIL && sticky && at && calls >= at && access(path, F_OK)) {   \
            errno = fault_errno;                                                   \
            result = -1;                                                           \
        } else if ((result = REAL(name)(path, flags, permissions)) >= 0)           \
            record('C', path, NULL, flags & O_TRUNC ? 1 : 0, NULL, 0);             \
        pthread_mutex_unlock(&lock);                                               \
        return result;                                                             \
    }
OPEN(open)
OPEN(open64)
