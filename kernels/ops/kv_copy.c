/* Copies KV between slots and the wire for pools in host memory; see kv_pack.py.

   A shuffled block is many short pieces, each on a page of its own. numpy walks them item by item
   and waits for each; here the next run's lines are on their way while this one's are copied, and
   what goes into the pool goes past the caches, which nobody reads it from soon. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

typedef struct {
    int64_t slot, token, num_tokens; /* token: from the first one of the payload on */
} Run;

typedef struct {
    char *pool, *wire;              /* [layers][K, V][slots][slot_bytes]; [layers][tokens][K, V][item_bytes] */
    Py_ssize_t num_layers, num_slots, num_tokens;
    Py_ssize_t slot_bytes, item_start, item_bytes;
    const Run *runs;
    Py_ssize_t num_runs;
    int to_wire;
} Copy;

static void prefetch(const char *at, Py_ssize_t num_bytes)
{
#ifdef __GNUC__
    for (Py_ssize_t i = 0; i < num_bytes; i += 64)
        __builtin_prefetch(at + i, 0, 0); /* read once: not to stay in the caches */
#endif
}

/* `past_caches`: for what nobody reads soon, so that memory is not read only to be overwritten. */
static inline void copy_item(char *to, const char *from, Py_ssize_t num_bytes, int past_caches)
{
#ifdef __SSE2__
    if ((((uintptr_t)to | (uintptr_t)num_bytes) & 15) == 0) {
        for (Py_ssize_t i = 0; i < num_bytes; i += 16) {
            __m128i piece = _mm_loadu_si128((const __m128i *)(from + i));
            if (past_caches)
                _mm_stream_si128((__m128i *)(to + i), piece);
            else
                _mm_store_si128((__m128i *)(to + i), piece);
        }
        return;
    }
#endif
    memcpy(to, from, (size_t)num_bytes);
}

/* `next_keys`: where the run after this one begins, or NULL. */
static void pack_run(const Copy *c, const Run *run, const char *keys, const char *next_keys, char *wire)
{
    Py_ssize_t to_values = c->num_slots * c->slot_bytes;
    for (int64_t token = 0; token < run->num_tokens; token++) {
        if (next_keys != NULL) {
            prefetch(next_keys, c->item_bytes);
            prefetch(next_keys + to_values, c->item_bytes);
            next_keys += c->slot_bytes;
        }
        copy_item(wire, keys, c->item_bytes, 0);
        copy_item(wire + c->item_bytes, keys + to_values, c->item_bytes, 0);
        wire += 2 * c->item_bytes;
        keys += c->slot_bytes;
    }
}

static void unpack_run(const Copy *c, const Run *run, char *keys, const char *wire)
{
    Py_ssize_t to_values = c->num_slots * c->slot_bytes;
    for (int64_t token = 0; token < run->num_tokens; token++) {
        copy_item(keys, wire, c->item_bytes, 1);
        copy_item(keys + to_values, wire + c->item_bytes, c->item_bytes, 1);
        wire += 2 * c->item_bytes;
        keys += c->slot_bytes;
    }
}

static void copy_all(const Copy *c)
{
    Py_ssize_t pool_layer = 2 * c->num_slots * c->slot_bytes;
    Py_ssize_t wire_layer = 2 * c->num_tokens * c->item_bytes;
    for (Py_ssize_t layer = 0; layer < c->num_layers; layer++) {
        char *pool = c->pool + layer * pool_layer + c->item_start;
        for (Py_ssize_t i = 0; i < c->num_runs; i++) {
            const Run *run = &c->runs[i];
            char *keys = pool + run->slot * c->slot_bytes;
            char *wire = c->wire + layer * wire_layer + 2 * run->token * c->item_bytes;
            const char *next_keys = NULL;
            if (i + 1 < c->num_runs)
                next_keys = pool + run[1].slot * c->slot_bytes;
            else if (layer + 1 < c->num_layers)
                next_keys = pool + pool_layer + c->runs[0].slot * c->slot_bytes;
            if (c->to_wire)
                pack_run(c, run, keys, next_keys, wire);
            else
                unpack_run(c, run, keys, wire);
        }
    }
#ifdef __SSE2__
    _mm_sfence(); /* before another thread is told */
#endif
}

/* Nothing is touched that is not inside both buffers. */
static int is_inside(const Copy *c)
{
    for (Py_ssize_t i = 0; i < c->num_runs; i++) {
        const Run *run = &c->runs[i];
        if (run->num_tokens <= 0 || run->num_tokens > c->num_tokens || run->num_tokens > c->num_slots
            || run->slot < 0 || run->slot > c->num_slots - run->num_tokens
            || run->token < 0 || run->token > c->num_tokens - run->num_tokens)
            return 0;
    }
    return 1;
}

/* The sizes that the buffers imply; 0 if they do not fit together. */
static int measure(Copy *c, Py_ssize_t pool_bytes, Py_ssize_t wire_bytes, Py_ssize_t pool_layers,
                   Py_ssize_t layer_start)
{
    if (pool_layers <= 0 || layer_start < 0 || c->num_layers <= 0
        || c->num_layers > pool_layers - layer_start || c->slot_bytes <= 0 || c->item_bytes <= 0
        || c->item_start < 0 || c->item_bytes > c->slot_bytes - c->item_start
        || pool_bytes % pool_layers || pool_bytes / pool_layers % 2
        || pool_bytes / pool_layers / 2 % c->slot_bytes)
        return 0;
    c->num_slots = pool_bytes / pool_layers / 2 / c->slot_bytes;
    if (c->num_slots == 0)
        return 0;
    Py_ssize_t token_bytes = c->num_layers * 2 * c->item_bytes; /* <= pool_bytes */
    c->num_tokens = wire_bytes / token_bytes;
    c->pool += layer_start * (pool_bytes / pool_layers);
    return wire_bytes % token_bytes == 0;
}

static PyObject *copy_runs(PyObject *module, PyObject *args)
{
    Py_buffer pool, wire, runs;
    Py_ssize_t pool_layers, layer_start;
    Copy c = {0};
    if (!PyArg_ParseTuple(args, "y*y*y*nnnnnnp", &pool, &wire, &runs, &pool_layers, &layer_start,
                          &c.num_layers, &c.slot_bytes, &c.item_start, &c.item_bytes, &c.to_wire))
        return NULL;
    c.pool = pool.buf;
    c.wire = wire.buf;
    c.runs = runs.buf;
    c.num_runs = runs.len / (Py_ssize_t)sizeof(Run);
    int is_right = (c.to_wire ? !wire.readonly : !pool.readonly)
                   && runs.len % (Py_ssize_t)sizeof(Run) == 0 && (uintptr_t)runs.buf % 8 == 0
                   && measure(&c, pool.len, wire.len, pool_layers, layer_start) && is_inside(&c);
    if (is_right) {
        Py_BEGIN_ALLOW_THREADS
        copy_all(&c);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "pool, payload and runs do not fit together");
    }
    PyBuffer_Release(&pool);
    PyBuffer_Release(&wire);
    PyBuffer_Release(&runs);
    if (!is_right)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"copy_runs", copy_runs, METH_VARARGS, "See _kv_copy.pyi."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kv_copy", "Copies KV between slots and the wire.", 0, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kv_copy(void)
{
    return PyModuleDef_Init(&definition);
}
