/* Page records of the ram section, written and taken by the run. The format is told in whimbrel_ram/records.py.
 *
 * No word of a record is believed: an offset is compared with the block before anything is written, and what is not an
 * ordinary record of a page is left to the caller. What only copies keeps the GIL: a call takes less time than giving it away
 * and getting it back beside a busy thread.
 */
#include "common.h"

enum { ZERO = 0x02, PAGE = 0x08, CONTINUE = 0x20 };
#define SMALLEST 64 /* page that leaves room for the flags */
#define ALIGNMENT 64 /* to which the kernel copies fastest */
#define AHEAD 16    /* pages, asked of memory before they are looked at */
#define AT_ONCE 512 /* pages of one system call, which takes no more than 1024 pieces */

static int
is_zero(const uint8_t *page, size_t size)
{
    if (load(page) || load(page + size / 2) || load(page + size - 8))
        return 0;
    for (size_t at = 0; at < size; at += 64) {
        uint64_t any = 0;
        for (size_t i = 0; i < 64; i += 8)
            any |= load(page + at + i);
        if (any)
            return 0;
    }
    return 1;
}

static PyObject *
zero(PyObject *module, PyObject *args)
{
    Py_buffer memory, pages, out;
    Py_ssize_t page_size;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*nw*", &memory, &pages, &page_size, &out))
        return NULL;
    PyObject *result = NULL;
    size_t count = (size_t)pages.len / sizeof(int64_t), size = (size_t)page_size;
    if (!is_page_size(page_size, SMALLEST) || (size_t)out.len != count || !are_inside(&pages, &memory, size)) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    PyThreadState *state = PyEval_SaveThread();
    for (size_t i = 0; i < count; i++) {
        if (i + AHEAD < count) /* most pages are told by their first word */
            __builtin_prefetch((const uint8_t *)memory.buf + page_at(&pages, i + AHEAD) * size);
        ((uint8_t *)out.buf)[i] = (uint8_t)is_zero((const uint8_t *)memory.buf + page_at(&pages, i) * size, size);
    }
    PyEval_RestoreThread(state);
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&memory);
    PyBuffer_Release(&pages);
    PyBuffer_Release(&out);
    return result;
}

static uint64_t
first_word(uint64_t page, size_t size)
{
    return big_endian(page * size | PAGE | CONTINUE);
}

static PyObject *
gather(PyObject *module, PyObject *args)
{
    Py_buffer out, memory, pages;
    Py_ssize_t page_size;
    (void)module;
    if (!PyArg_ParseTuple(args, "w*y*y*n", &out, &memory, &pages, &page_size))
        return NULL;
    PyObject *result = NULL;
    size_t count = (size_t)pages.len / sizeof(int64_t), size = (size_t)page_size;
    if (!is_page_size(page_size, SMALLEST) || (size_t)out.len / (8 + size) < count || !are_inside(&pages, &memory, size)) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    uint8_t *at = out.buf;
    for (size_t i = 0; i < count; i++) {
        uint64_t page = page_at(&pages, i), word = first_word(page, size);
        memcpy(at, &word, 8);
        memcpy(at + 8, (const uint8_t *)memory.buf + page * size, size);
        at += 8 + size;
    }
    result = PyLong_FromSize_t(count * (8 + size));
done:
    PyBuffer_Release(&out);
    PyBuffer_Release(&memory);
    PyBuffer_Release(&pages);
    return result;
}

static PyObject *
send_records(PyObject *module, PyObject *args)
{
    int fd;
    Py_buffer memory, pages;
    Py_ssize_t page_size;
    (void)module;
    if (!PyArg_ParseTuple(args, "iy*y*n", &fd, &memory, &pages, &page_size))
        return NULL;
    PyObject *result = NULL;
    size_t count = (size_t)pages.len / sizeof(int64_t), size = (size_t)page_size;
    if (!is_page_size(page_size, SMALLEST) || !are_inside(&pages, &memory, size)) {
        PyErr_SetString(PyExc_ValueError, "a page that is not in the memory");
        goto done;
    }
    uint64_t words[AT_ONCE];
    struct iovec pieces[2 * AT_ONCE];
    int failed = 0;
    PyThreadState *state = PyEval_SaveThread();
    for (size_t first = 0; first < count && !failed; first += AT_ONCE) {
        size_t some = count - first < AT_ONCE ? count - first : AT_ONCE;
        for (size_t i = 0; i < some; i++) {
            uint64_t page = page_at(&pages, first + i);
            words[i] = first_word(page, size);
            pieces[2 * i].iov_base = words + i;
            pieces[2 * i].iov_len = sizeof *words;
            pieces[2 * i + 1].iov_base = (uint8_t *)memory.buf + page * size;
            pieces[2 * i + 1].iov_len = size;
        }
        failed = send_whole(fd, pieces, 2 * some, &state);
    }
    PyEval_RestoreThread(state);
    result = failed ? give_up(failed) : PyLong_FromSize_t(count * (8 + size));
done:
    PyBuffer_Release(&memory);
    PyBuffer_Release(&pages);
    return result;
}

/* A block that records are taken into. */
struct target {
    uint8_t *memory, *fresh;
    size_t pages, size;
    Py_ssize_t normal, zero; /* that were taken */
};

/* Whether what is there of a record, 8 bytes at least, is of one that is taken once it is whole. */
static int
is_ours(const uint8_t *at, size_t have, const struct target *target)
{
    uint64_t word = big_endian(load(at)), flags = word & (target->size - 1);
    if (word / target->size >= target->pages)
        return 0;
    return flags == (PAGE | CONTINUE) || (flags == (ZERO | CONTINUE) && (have < 9 || !at[8]));
}

/* Takes the records at the front; the bytes of them. */
static size_t
take_some(const uint8_t *at, size_t have, struct target *target)
{
    const uint8_t *start = at, *end = at + have;
    size_t size = target->size;
    while (end - at >= 9 && is_ours(at, (size_t)(end - at), target)) {
        uint64_t word = big_endian(load(at)), page = word / size;
        uint8_t *into = target->memory + page * size;
        if (word & PAGE) {
            if ((size_t)(end - at) < 8 + size)
                break;
            memcpy(into, at + 8, size);
            target->fresh[page] = 0;
            target->normal++;
            at += 8 + size;
        }
        else {
            /* Zero is only written where something else is: looking at a fresh page would take memory of the host. */
            if (!target->fresh[page] && !is_zero(into, size))
                memset(into, 0, size);
            target->zero++;
            at += 9;
        }
    }
    return (size_t)(at - start);
}

/* 0, with an exception, for buffers that do not fit each other. */
static int
set_target(struct target *target, const Py_buffer *memory, const Py_buffer *fresh, Py_ssize_t page_size)
{
    if (!is_page_size(page_size, SMALLEST) || memory->len % page_size || fresh->len != memory->len / page_size) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        return 0;
    }
    *target = (struct target){memory->buf, fresh->buf, (size_t)fresh->len, (size_t)page_size, 0, 0};
    return 1;
}

static PyObject *
take(PyObject *module, PyObject *args)
{
    Py_buffer data, memory, fresh;
    Py_ssize_t page_size;
    struct target target;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*w*n", &data, &memory, &fresh, &page_size))
        return NULL;
    PyObject *result = NULL;
    if (set_target(&target, &memory, &fresh, page_size)) {
        size_t taken = take_some(data.buf, (size_t)data.len, &target);
        result = Py_BuildValue("nnn", (Py_ssize_t)taken, target.normal, target.zero);
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&memory);
    PyBuffer_Release(&fresh);
    return result;
}

static PyObject *
receive(PyObject *module, PyObject *args)
{
    int fd;
    Py_buffer buffer, memory, fresh;
    Py_ssize_t start, end, page_size;
    struct target target;
    (void)module;
    if (!PyArg_ParseTuple(args, "iw*nnw*w*n", &fd, &buffer, &start, &end, &memory, &fresh, &page_size))
        return NULL;
    PyObject *result = NULL;
    if (!set_target(&target, &memory, &fresh, page_size))
        goto done;
    if (start < 0 || start > end || end > buffer.len || buffer.len < 2 * (8 + page_size)) {
        PyErr_SetString(PyExc_ValueError, "a place outside of the buffer");
        goto done;
    }
    uint8_t *data = buffer.buf;
    Py_ssize_t taken = 0;
    ssize_t n = 1;
    int why = 0;
    PyThreadState *state = PyEval_SaveThread();
    int64_t until = now() + TURN;
    for (;;) {
        Py_ssize_t some = (Py_ssize_t)take_some(data + start, (size_t)(end - start), &target);
        start += some;
        taken += some;
        Py_ssize_t rest = end - start, front = -rest & (ALIGNMENT - 1);
        if ((rest >= 8 && !is_ours(data + start, (size_t)rest, &target)) || now() > until)
            break;
        memmove(data + front, data + start, (size_t)rest);
        start = front;
        end = front + rest;
        do
            n = recv(fd, data + end, (size_t)(buffer.len - end), 0);
        while (n < 0 && !(why = wait_to_try(fd, POLLIN, &state)));
        if (n <= 0)
            break;
        end += n;
    }
    PyEval_RestoreThread(state);
    if (n < 0)
        result = give_up(why);
    else
        result = Py_BuildValue("nnnnn", start, end, taken, target.normal, target.zero);
done:
    PyBuffer_Release(&buffer);
    PyBuffer_Release(&memory);
    PyBuffer_Release(&fresh);
    return result;
}

static PyMethodDef methods[] = {
    {"gather", gather, METH_VARARGS, "gather(out, memory, pages, page_size) -> bytes in out"},
    {"send", send_records, METH_VARARGS, "send(fd, memory, pages, page_size) -> bytes sent"},
    {"zero", zero, METH_VARARGS, "zero(memory, pages, page_size, out): which of them are zero"},
    {"take", take, METH_VARARGS, "take(data, memory, fresh, page_size) -> (bytes taken, pages, zero pages)"},
    {"receive", receive, METH_VARARGS,
     "receive(fd, buffer, start, end, memory, fresh, page_size) -> (start, end, bytes taken, pages, zero pages)"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_records", .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__records(void)
{
    return PyModuleDef_Init(&module);
}
