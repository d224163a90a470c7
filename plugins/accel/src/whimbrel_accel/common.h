/* What the loops share. */
#ifndef WHIMBREL_COMMON_H
#define WHIMBREL_COMMON_H

#include <Python.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#define TURN 20000000 /* ns after which what was received is told of */

static inline uint64_t
load(const uint8_t *at)
{
    uint64_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

static inline uint64_t
big_endian(uint64_t word)
{
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    return __builtin_bswap64(word);
#else
    return word;
#endif
}

static inline int64_t
now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline int
is_page_size(Py_ssize_t size, Py_ssize_t smallest)
{
    return size >= smallest && !(size & (size - 1));
}

/* Page number i of a buffer of int64. */
static inline uint64_t
page_at(const Py_buffer *pages, size_t i)
{
    return load((const uint8_t *)pages->buf + 8 * i);
}

/* Whether all of them are in the memory. */
static inline int
are_inside(const Py_buffer *pages, const Py_buffer *memory, size_t size)
{
    for (size_t i = 0; i < (size_t)pages->len / 8; i++)
        if (page_at(pages, i) >= (size_t)memory->len / size)
            return 0;
    return 1;
}

/* The buffers that are left when `done` bytes of them are. */
static inline void
advance(struct msghdr *message, size_t done)
{
    while (message->msg_iovlen && done >= message->msg_iov->iov_len) {
        done -= message->msg_iov->iov_len;
        message->msg_iov++;
        message->msg_iovlen--;
    }
    if (done) {
        message->msg_iov->iov_base = (uint8_t *)message->msg_iov->iov_base + done;
        message->msg_iov->iov_len -= done;
    }
}

/* What a call without the GIL gave up for. */
enum { FAILED = -1, RAISED = -2 };

/* Lets handlers of signals run (Ctrl-C): 0, or RAISED with an exception. */
static inline int
look_for_signals(PyThreadState **state)
{
    PyEval_RestoreThread(*state);
    int raised = PyErr_CheckSignals();
    *state = PyEval_SaveThread();
    return raised ? RAISED : 0;
}

/* A call on a socket gave -1: 0 once it can be tried again, else what to give up for. A shutdown ends the wait. */
static inline int
wait_to_try(int fd, short events, PyThreadState **state)
{
    if (errno == EAGAIN || errno == EWOULDBLOCK) { /* somebody else who holds the socket wants it so */
        struct pollfd wait = {.fd = fd, .events = events};
        if (poll(&wait, 1, -1) >= 0)
            return 0;
    }
    return errno == EINTR ? look_for_signals(state) : FAILED;
}

/* The exception of what gave up, with the GIL. NULL. */
static inline PyObject *
give_up(int why)
{
    return why == RAISED ? NULL : PyErr_SetFromErrno(PyExc_OSError);
}

/* 0, or what it gave up for. */
static inline int
send_whole(int fd, struct iovec *pieces, size_t count, PyThreadState **state)
{
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
    while (message.msg_iovlen) {
        ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL);
        int why = 0;
        if (n < 0)
            why = wait_to_try(fd, POLLOUT, state);
        else {
            advance(&message, (size_t)n);
            if (message.msg_iovlen) /* a signal cuts it short */
                why = look_for_signals(state);
        }
        if (why)
            return why;
    }
    return 0;
}

/* The bytes that came, fewer at the end of the connection; or what it gave up for. */
static inline ssize_t
receive_whole(int fd, struct iovec *pieces, size_t count, PyThreadState **state)
{
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
    ssize_t got = 0;
    while (message.msg_iovlen) {
        ssize_t n = recvmsg(fd, &message, MSG_WAITALL);
        int why = 0;
        if (n == 0)
            break;
        if (n < 0)
            why = wait_to_try(fd, POLLIN, state);
        else {
            advance(&message, (size_t)n);
            got += n;
            if (message.msg_iovlen)
                why = look_for_signals(state);
        }
        if (why)
            return why;
    }
    return got;
}

#endif
