/* XBZRLE deltas: what changed in a page since it was last sent. The format is told in whimbrel_ram/xbzrle.py.
 *
 * No byte of a delta is believed: its runs are checked against its end and against the page before anything is written.
 * Both loops run without the GIL; the buffers are held meanwhile.
 */
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define BY_WORD 1
#else
#define BY_WORD 0
#endif

#define ONES 0x0101010101010101u
#define HIGHS 0x8080808080808080u

static uint64_t
differ(const uint8_t *a, const uint8_t *b)
{
    uint64_t x, y;
    memcpy(&x, a, 8);
    memcpy(&y, b, 8);
    return x ^ y;
}

/* From `at` on: where the first byte is that differs. */
static size_t
skip_equal(const uint8_t *a, const uint8_t *b, size_t at, size_t size)
{
    for (; BY_WORD && at + 8 <= size; at += 8) {
        uint64_t x = differ(a + at, b + at);
        if (x)
            return at + (size_t)(__builtin_ctzll(x) >> 3);
    }
    while (at < size && a[at] == b[at])
        at++;
    return at;
}

/* From `at` on: where the first byte is that is equal. */
static size_t
skip_changed(const uint8_t *a, const uint8_t *b, size_t at, size_t size)
{
    for (; BY_WORD && at + 8 <= size; at += 8) {
        uint64_t x = differ(a + at, b + at);
        uint64_t zero = (x - ONES) & ~x & HIGHS; /* its lowest bit is that of the first zero byte */
        if (zero)
            return at + (size_t)(__builtin_ctzll(zero) >> 3);
    }
    while (at < size && a[at] != b[at])
        at++;
    return at;
}

static size_t
put_length(uint8_t *out, size_t n)
{
    if (n < 128) {
        out[0] = (uint8_t)n;
        return 1;
    }
    out[0] = (uint8_t)(n & 127) | 128;
    out[1] = (uint8_t)(n >> 7);
    return 2;
}

/* The bytes of one delta; `size`: it would be no shorter than the page. out has room for `size` bytes. */
static size_t
encode_page(const uint8_t *old, const uint8_t *new, size_t size, uint8_t *out)
{
    size_t at = 0, used = 0;
    for (;;) {
        size_t begin = skip_equal(old, new, at, size);
        if (begin == size)
            return used;
        size_t end = skip_changed(old, new, begin, size);
        if (used + 4 + (end - begin) >= size) { /* 4: the most that two lengths take */
            size_t heads = 2 + (begin - at > 127) + (end - begin > 127);
            if (used + heads + (end - begin) >= size)
                return size;
        }
        used += put_length(out + used, begin - at);
        used += put_length(out + used, end - begin);
        memcpy(out + used, new + begin, end - begin);
        used += end - begin;
        at = end;
    }
}

enum { FINE, EMPTY_GAP, NO_RUN, EMPTY_RUN, BEHIND_DELTA, BEHIND_PAGE };

static const char *const reasons[] = {
    "",
    "an unchanged run of 0 bytes inside a page",
    "it ends with an unchanged run",
    "a changed run of 0 bytes",
    "a run goes on behind the end of the delta",
    "a run goes on behind the end of the page",
};

/* A length of one byte or two. One that says that a third follows is longer than any page; one that is cut off ends
 * behind the end. */
static const uint8_t *
take_length(const uint8_t *at, const uint8_t *end, size_t *value)
{
    *value = at[0];
    if (at[0] < 128)
        return at + 1;
    *value = (at[0] & 127u) | (at + 1 < end ? (size_t)at[1] << 7 : 0);
    return at + 2;
}

/* Looks at a delta, and, where page is given, writes what it says there. */
static int
take_delta(const uint8_t *at, const uint8_t *end, size_t size, uint8_t *page)
{
    size_t done = 0;
    const uint8_t *start = at;
    while (at < end) {
        size_t gap, run;
        int inside = at != start;
        at = take_length(at, end, &gap);
        if (inside && gap == 0)
            return EMPTY_GAP;
        if (at >= end)
            return NO_RUN;
        at = take_length(at, end, &run);
        if (run == 0)
            return EMPTY_RUN;
        if (at > end || run > (size_t)(end - at))
            return BEHIND_DELTA;
        if (done + gap + run > size)
            return BEHIND_PAGE;
        if (page)
            memcpy(page + done + gap, at, run);
        done += gap + run;
        at += run;
    }
    return FINE;
}

static PyObject *
encode(PyObject *module, PyObject *args)
{
    Py_buffer old, new, out, lengths;
    Py_ssize_t page_size;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*nw*w*", &old, &new, &page_size, &out, &lengths))
        return NULL;
    PyObject *result = NULL;
    if (page_size < 1 || page_size > 1 << 14 || old.len % page_size || new.len != old.len || out.len < old.len
        || lengths.len / (Py_ssize_t)sizeof(int64_t) < old.len / page_size) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    size_t used = 0, size = (size_t)page_size, pages = (size_t)(old.len / page_size);
    PyThreadState *state = PyEval_SaveThread();
    for (size_t i = 0; i < pages; i++) {
        const uint8_t *before = (const uint8_t *)old.buf + i * size, *now = (const uint8_t *)new.buf + i * size;
        size_t n = encode_page(before, now, size, (uint8_t *)out.buf + used);
        int64_t told = (int64_t)n;
        memcpy((uint8_t *)lengths.buf + i * sizeof told, &told, sizeof told);
        if (n < size)
            used += n;
    }
    PyEval_RestoreThread(state);
    result = PyLong_FromSize_t(used);
done:
    PyBuffer_Release(&old);
    PyBuffer_Release(&new);
    PyBuffer_Release(&out);
    PyBuffer_Release(&lengths);
    return result;
}

static int64_t
number(const Py_buffer *numbers, size_t i)
{
    int64_t n;
    memcpy(&n, (const uint8_t *)numbers->buf + i * sizeof n, sizeof n);
    return n;
}

static PyObject *
patch(PyObject *module, PyObject *args)
{
    Py_buffer data, starts, lengths, where, memory;
    Py_ssize_t page_size;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*y*nw*", &data, &starts, &lengths, &where, &page_size, &memory))
        return NULL;
    PyObject *result = NULL;
    size_t count = (size_t)starts.len / sizeof(int64_t);
    int fits = page_size > 0 && lengths.len == starts.len && where.len == starts.len;
    for (size_t i = 0; fits && i < count; i++) {
        int64_t start = number(&starts, i), length = number(&lengths, i), page = number(&where, i);
        fits = start >= 0 && length >= 0 && start <= data.len && length <= data.len - start && page >= 0
            && page <= memory.len - page_size;
    }
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    int wrong = FINE;
    size_t i = 0;
    PyThreadState *state = PyEval_SaveThread();
    for (int writing = 0; writing < 2 && wrong == FINE; writing++)
        for (i = 0; i < count; i++) {
            const uint8_t *delta = (const uint8_t *)data.buf + number(&starts, i);
            uint8_t *page = writing ? (uint8_t *)memory.buf + number(&where, i) : NULL;
            wrong = take_delta(delta, delta + number(&lengths, i), (size_t)page_size, page);
            if (wrong != FINE)
                break;
        }
    PyEval_RestoreThread(state);
    result = wrong == FINE ? Py_NewRef(Py_None) : Py_BuildValue("(ni)", (Py_ssize_t)i, wrong);
done:
    PyBuffer_Release(&data);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&lengths);
    PyBuffer_Release(&where);
    PyBuffer_Release(&memory);
    return result;
}

static int
fill(PyObject *module)
{
    Py_ssize_t count = (Py_ssize_t)(sizeof reasons / sizeof *reasons);
    PyObject *all = PyTuple_New(count);
    if (!all)
        return -1;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *text = PyUnicode_FromString(reasons[i]);
        if (!text || PyTuple_SetItem(all, i, text)) {
            Py_DECREF(all);
            return -1;
        }
    }
    int failed = PyModule_AddObjectRef(module, "REASONS", all);
    Py_DECREF(all);
    return failed;
}

static PyMethodDef methods[] = {
    {"encode", encode, METH_VARARGS, "encode(old, new, page_size, out, lengths) -> bytes in out"},
    {"patch", patch, METH_VARARGS, "patch(data, starts, lengths, where, page_size, memory) -> None or (index, reason)"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_deltas", .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__deltas(void)
{
    return PyModuleDef_Init(&module);
}
