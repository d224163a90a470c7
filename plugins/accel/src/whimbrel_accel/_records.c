/* Page records of the ram section, written and taken by the run. The format is told in whimbrel_ram/records.py.
 *
 * No word of a record is believed: an offset is compared with the block before anything is written, and what is not an
 * ordinary record of a page is left to the caller. What only copies keeps the GIL: a call takes less time than giving it away
 * and getting it back beside a busy thread.
 */
#include "common.h"

enum { ZERO = 0x02, PAGE = 0x08, CONTINUE = 0x20 };
#define SMALLEST 64 /* page that leaves room for the flags */
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
        failed = send_whole(fd, pieces, 2 * some);
    }
    PyEval_RestoreThread(state);
    result = failed ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromSize_t(count * (8 + size));
done:
    PyBuffer_Release(&memory);
    PyBuffer_Release(&pages);
    return result;
}

static PyObject *
take(PyObject *module, PyObject *args)
{
    Py_buffer data, memory, fresh;
    Py_ssize_t page_size;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*w*n", &data, &memory, &fresh, &page_size))
        return NULL;
    PyObject *result = NULL;
    size_t size = (size_t)page_size, pages = (size_t)memory.len / size;
    if (!is_page_size(page_size, SMALLEST) || (size_t)memory.len % size || (size_t)fresh.len != pages) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    const uint8_t *at = data.buf, *end = at + data.len;
    uint8_t *is_fresh = fresh.buf;
    Py_ssize_t normal = 0, zero = 0;
    while (end - at >= 9) {
        uint64_t word = big_endian(load(at)), flags = word & (size - 1), page = word / size;
        uint8_t *into = (uint8_t *)memory.buf + page * size;
        if (page >= pages)
            break;
        if (flags == (PAGE | CONTINUE)) {
            if ((size_t)(end - at) < 8 + size)
                break;
            memcpy(into, at + 8, size);
            is_fresh[page] = 0;
            at += 8 + size;
            normal++;
        }
        else if (flags == (ZERO | CONTINUE) && !at[8]) {
            /* Zero is only written where something else is: looking at a fresh page would take memory of the host. */
            if (!is_fresh[page] && !is_zero(into, size))
                memset(into, 0, size);
            at += 9;
            zero++;
        }
        else
            break;
    }
    result = Py_BuildValue("nnn", (Py_ssize_t)(at - (const uint8_t *)data.buf), normal, zero);
done:
    PyBuffer_Release(&data);
    PyBuffer_Release(&memory);
    PyBuffer_Release(&fresh);
    return result;
}

static PyMethodDef methods[] = {
    {"gather", gather, METH_VARARGS, "gather(out, memory, pages, page_size) -> bytes in out"},
    {"send", send_records, METH_VARARGS, "send(fd, memory, pages, page_size) -> bytes sent"},
    {"zero", zero, METH_VARARGS, "zero(memory, pages, page_size, out): which of them are zero"},
    {"take", take, METH_VARARGS, "take(data, memory, fresh, page_size) -> (bytes taken, pages, zero pages)"},
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
