/* Packets of multifd between memory and a socket, many of them in one call that runs without the GIL. The format is told in
 * whimbrel_ram/multifd/wire.py.
 *
 * Only what most packets are is done here: pages as they are, in one block, without a sync. A header that says anything else
 * is left to the caller as it came, and nothing that it says is believed before it was compared with the block.
 */
#include "common.h"

enum { MAGIC = 0x11223344, VERSION = 1, FIXED = 320, IDSTR = 64, IDSTR_SIZE = 256, PACKET = 512 << 10 };
enum { AT_FLAGS = 8, AT_ALLOC = 12, AT_NORMAL = 16, AT_NEXT = 20, AT_NUMBER = 24, AT_ZERO = 32 };
#define SMALLEST 1024 /* page of any target; with smaller ones a packet would have more pieces than a call may */

static void
put(uint8_t *at, uint64_t value, int size)
{
    while (size--) {
        at[size] = (uint8_t)value;
        value >>= 8;
    }
}

static uint64_t
get(const uint8_t *at, int size)
{
    uint64_t value = 0;
    for (int i = 0; i < size; i++)
        value = value << 8 | at[i];
    return value;
}

static size_t
pages_of(size_t page_size)
{
    return page_size < PACKET ? PACKET / page_size : 1;
}

/* One more page at `at`, behind the `used` pieces of memory or as a part of the last; how many pieces there are then. */
static size_t
piece(struct iovec *pieces, size_t used, uint8_t *at, size_t page_size)
{
    if (used && (uint8_t *)pieces[used - 1].iov_base + pieces[used - 1].iov_len == at) {
        pieces[used - 1].iov_len += page_size;
        return used;
    }
    pieces[used].iov_base = at;
    pieces[used].iov_len = page_size;
    return used + 1;
}

static PyObject *
send_packets(PyObject *module, PyObject *args)
{
    int fd;
    Py_buffer idstr, memory, pages;
    Py_ssize_t page_size;
    unsigned long long number;
    (void)module;
    if (!PyArg_ParseTuple(args, "iy*y*y*nK", &fd, &idstr, &memory, &pages, &page_size, &number))
        return NULL;
    PyObject *result = NULL;
    uint8_t *head = NULL;
    struct iovec *pieces = NULL;
    size_t size = (size_t)page_size, count = (size_t)pages.len / sizeof(int64_t);
    if (!is_page_size(page_size, SMALLEST) || idstr.len >= IDSTR_SIZE || !are_inside(&pages, &memory, size)) {
        PyErr_SetString(PyExc_ValueError, "pages that are not in the memory, or too long a name");
        goto done;
    }
    size_t most = pages_of(size), head_size = FIXED + 8 * most, sent = 0;
    head = PyMem_Calloc(1, head_size);
    pieces = PyMem_Calloc(1 + most, sizeof *pieces);
    if (!head || !pieces) {
        PyErr_NoMemory();
        goto done;
    }
    int failed = 0;
    PyThreadState *state = PyEval_SaveThread();
    put(head, MAGIC, 4);
    put(head + 4, VERSION, 4);
    put(head + AT_ALLOC, most, 4);
    memcpy(head + IDSTR, idstr.buf, (size_t)idstr.len);
    for (size_t first = 0; first < count && !failed; first += most) {
        size_t some = count - first < most ? count - first : most, used = 0;
        put(head + AT_NORMAL, some, 4);
        put(head + AT_NEXT, some * size, 4);
        put(head + AT_NUMBER, number++, 8);
        memset(head + FIXED, 0, 8 * most);
        for (size_t i = 0; i < some; i++) {
            uint64_t offset = page_at(&pages, first + i) * size;
            put(head + FIXED + 8 * i, offset, 8);
            used = piece(pieces + 1, used, (uint8_t *)memory.buf + offset, size);
        }
        pieces[0].iov_base = head;
        pieces[0].iov_len = head_size;
        failed = send_whole(fd, pieces, 1 + used, &state);
        sent += head_size + some * size;
    }
    PyEval_RestoreThread(state);
    result = failed ? give_up(failed) : PyLong_FromSize_t(sent);
done:
    PyMem_Free(head);
    PyMem_Free(pieces);
    PyBuffer_Release(&idstr);
    PyBuffer_Release(&memory);
    PyBuffer_Release(&pages);
    return result;
}

/* Whether a header is one of pages as they are, all of them in that block; then they are in `pieces`, their number is
 * returned. Else 0. */
static size_t
understand(const uint8_t *head, const Py_buffer *idstr, const Py_buffer *memory, size_t size, struct iovec *pieces,
           size_t *used)
{
    size_t most = pages_of(size), normal = get(head + AT_NORMAL, 4), length = (size_t)idstr->len;
    if (get(head, 4) != MAGIC || get(head + 4, 4) != VERSION || get(head + AT_FLAGS, 4) || get(head + AT_ZERO, 4)
        || !normal || normal > most || get(head + AT_ALLOC, 4) > most || normal > get(head + AT_ALLOC, 4)
        || get(head + AT_NEXT, 4) != normal * size)
        return 0;
    if (memcmp(head + IDSTR, idstr->buf, length) || head[IDSTR + length])
        return 0;
    *used = 0;
    for (size_t i = 0; i < normal; i++) {
        uint64_t offset = get(head + FIXED + 8 * i, 8);
        if (offset % size || offset >= (size_t)memory->len)
            return 0;
        *used = piece(pieces, *used, (uint8_t *)memory->buf + offset, size);
    }
    return normal;
}

static PyObject *
receive_packets(PyObject *module, PyObject *args)
{
    int fd;
    Py_buffer head, idstr, memory, fresh;
    Py_ssize_t page_size;
    (void)module;
    if (!PyArg_ParseTuple(args, "iw*y*w*w*n", &fd, &head, &idstr, &memory, &fresh, &page_size))
        return NULL;
    PyObject *result = NULL;
    struct iovec *pieces = NULL;
    size_t size = (size_t)page_size, most = is_page_size(page_size, SMALLEST) ? pages_of(size) : 0, head_size = FIXED + 8 * most;
    if (!most || (size_t)head.len != head_size || idstr.len >= IDSTR_SIZE || (size_t)memory.len % size
        || (size_t)fresh.len != (size_t)memory.len / size) {
        PyErr_SetString(PyExc_ValueError, "buffers that do not fit each other");
        goto done;
    }
    pieces = PyMem_Calloc(1 + most, sizeof *pieces);
    if (!pieces) {
        PyErr_NoMemory();
        goto done;
    }
    Py_ssize_t pages = 0, got = 0, whole = (Py_ssize_t)head_size, wanted = whole;
    ssize_t n = whole;
    PyThreadState *state = PyEval_SaveThread();
    int64_t until = now() + TURN;
    while (n == wanted) {
        size_t used, normal = understand(head.buf, &idstr, &memory, size, pieces, &used);
        if (!normal || (pages && now() > until))
            break;
        for (size_t i = 0; i < used; i++) {
            size_t page = (size_t)((uint8_t *)pieces[i].iov_base - (uint8_t *)memory.buf) / size;
            memset((uint8_t *)fresh.buf + page, 0, pieces[i].iov_len / size);
        }
        pieces[used].iov_base = head.buf; /* of the next packet: pages without a sync are not the end */
        pieces[used].iov_len = head_size;
        wanted = (Py_ssize_t)(normal * size) + whole;
        n = receive_whole(fd, pieces, used + 1, &state);
        if (n < 0)
            break;
        got += n;
        if (n >= wanted - whole)
            pages += (Py_ssize_t)normal;
    }
    PyEval_RestoreThread(state);
    result = n < 0 ? give_up((int)n) : Py_BuildValue("nnn", pages, got, wanted - (Py_ssize_t)n);
done:
    PyMem_Free(pieces);
    PyBuffer_Release(&head);
    PyBuffer_Release(&idstr);
    PyBuffer_Release(&memory);
    PyBuffer_Release(&fresh);
    return result;
}

static PyMethodDef methods[] = {
    {"send", send_packets, METH_VARARGS, "send(fd, idstr, memory, pages, page_size, number) -> bytes sent"},
    {"receive", receive_packets, METH_VARARGS,
     "receive(fd, head, idstr, memory, fresh, page_size) -> (pages, bytes received, bytes missing)"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_packets", .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__packets(void)
{
    return PyModuleDef_Init(&module);
}
