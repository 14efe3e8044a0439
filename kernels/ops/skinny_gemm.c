/* x Wᵀ for a few rows of float32, with the bits and the weights of oneDNN's inner product.

   At a handful of rows a product is as long in arithmetic as in reading the weights from memory, so
   both must go on at once: while one piece of a panel is multiplied out of the first cache, the next
   one is on its way there. The libraries do one after the other (docs/performance.md). */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <string.h>

#include "skinny.h"

#define PANEL 64    /* output features side by side: [panels][in_features, padded][PANEL] */
#define PADDED_TO 16 /* in_features of a panel */
#define MAX_ROWS 32
#define PIECE 1024  /* in_features that are summed by themselves, one after the other */
#define TILE 32     /* of them, multiplied while the next ones are fetched: 8 KiB */

typedef enum { NONE, SWISH, MUL, ADD, NUM_OPS } Op;

typedef struct {
    const float *x, *weight, *bias, *other; /* bias and other may be NULL */
    float *out;
    Py_ssize_t num_rows, in_features, out_features;
    Op op;
    Py_ssize_t num_panels, panel_size, next_panel;
} Product;

/* ── sums ─────────────────────────────────────────────────────────────────────────────────────── */

typedef void (*Multiply)(const Product *, const float *, const float *, float *, Py_ssize_t, const char *,
                         Py_ssize_t);

#define DEFINE_MULTIPLY(rows, vectors)                                                                  \
    AVX2 static void multiply_##rows##x##vectors(const Product *p, const float *x, const float *w,      \
                                                 float *sums, Py_ssize_t num_k, const char *ahead,      \
                                                 Py_ssize_t lines_per_k)                                \
    {                                                                                                   \
        multiply(x, p->in_features, w, PANEL, sums, PANEL, num_k, ahead, lines_per_k, rows, vectors);   \
    }
DEFINE_MULTIPLY(1, 8)
DEFINE_MULTIPLY(2, 4)
DEFINE_MULTIPLY(3, 4)
DEFINE_MULTIPLY(4, 3)
DEFINE_MULTIPLY(4, 2)

typedef struct {
    Multiply multiply;
    int first; /* output feature of the panel */
} Share;

/* By rows: what the sixteen registers hold at a time. */
static const Share shares[5][3] = {
    {{NULL, 0}},
    {{multiply_1x8, 0}},
    {{multiply_2x4, 0}, {multiply_2x4, 32}},
    {{multiply_3x4, 0}, {multiply_3x4, 32}},
    {{multiply_4x3, 0}, {multiply_4x3, 24}, {multiply_4x2, 48}},
};
static const int num_shares[5] = {0, 1, 2, 2, 3};

/* sums[num_rows][PANEL] += num_k products, while as many k from `ahead` on are fetched. */
static void multiply_tile(const Product *p, const float *x, const float *w, float *sums, Py_ssize_t num_k,
                          const char *ahead)
{
    Py_ssize_t num_groups = (p->num_rows + 3) / 4, large = p->num_rows % num_groups;
    int rows_of_small = (int)(p->num_rows / num_groups);
    Py_ssize_t calls = large * num_shares[rows_of_small + (large > 0)]
                       + (num_groups - large) * num_shares[rows_of_small];
    Py_ssize_t lines = ahead == NULL ? 0 : PANEL * 4 / 64; /* of each k */
    for (Py_ssize_t group = 0; group < num_groups; group++) {
        int rows = rows_of_small + (group < large);
        for (int i = 0; i < num_shares[rows]; i++, calls--) {
            const Share *share = &shares[rows][i];
            Py_ssize_t now = (lines + calls - 1) / calls;
            share->multiply(p, x, w + share->first, sums + share->first, num_k, ahead, now);
            ahead += now * num_k * 64;
            lines -= now;
        }
        x += rows * p->in_features;
        sums += rows * PANEL;
    }
}

/* ── what follows them ────────────────────────────────────────────────────────────────────────── */

/* x / (1 + exp(-x)), by the exponential of what is negative. */
INLINE __m256 swish(__m256 x)
{
    __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    __m256 power = exp_of_negative(_mm256_or_ps(x, sign));
    __m256 of_negative = _mm256_div_ps(power, _mm256_add_ps(power, one));
    __m256 of_positive = _mm256_sub_ps(one, of_negative);
    return _mm256_mul_ps(x, _mm256_blendv_ps(of_positive, of_negative, x));
}

INLINE __m256 finish(__m256 y, const Product *p, const float *bias, const float *other, __m256i mask)
{
    if (bias != NULL)
        y = _mm256_add_ps(y, _mm256_maskload_ps(bias, mask));
    switch (p->op) {
    case SWISH:
        return swish(y);
    case MUL:
        return _mm256_mul_ps(y, _mm256_maskload_ps(other, mask));
    case ADD:
        return _mm256_add_ps(y, _mm256_maskload_ps(other, mask));
    default:
        return y;
    }
}

AVX2 static void finish_panel(const Product *p, const float *sums, Py_ssize_t first)
{
    Py_ssize_t last = first + PANEL < p->out_features ? first + PANEL : p->out_features;
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (Py_ssize_t r = 0; r < p->num_rows; r++)
        for (Py_ssize_t n = first; n < last; n += 8) {
            __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(last - n)), lane);
            Py_ssize_t at = r * p->out_features + n;
            __m256 y = _mm256_load_ps(sums + r * PANEL + n - first);
            y = finish(y, p, p->bias == NULL ? NULL : p->bias + n, p->other == NULL ? NULL : p->other + at,
                       mask);
            if (last - n >= 8)
                _mm256_storeu_ps(p->out + at, y);
            else
                _mm256_maskstore_ps(p->out + at, mask, y);
        }
}

/* ── panels ───────────────────────────────────────────────────────────────────────────────────── */

AVX2 static void add(float *sums, const float *more, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i += 8)
        _mm256_store_ps(sums + i, _mm256_add_ps(_mm256_load_ps(sums + i), _mm256_load_ps(more + i)));
}

/* `next`: the panel that this thread computes after this one, or NULL. */
static void multiply_panel(const Product *p, const float *panel, const float *next, Py_ssize_t first)
{
    _Alignas(32) float whole[MAX_ROWS * PANEL], of_piece[MAX_ROWS * PANEL];
    size_t num_bytes = (size_t)p->num_rows * PANEL * sizeof(float);
    for (Py_ssize_t start = 0; start < p->in_features; start += PIECE) {
        Py_ssize_t stop = start + PIECE < p->in_features ? start + PIECE : p->in_features;
        float *sums = start == 0 ? whole : of_piece;
        memset(sums, 0, num_bytes);
        for (Py_ssize_t k = start; k < stop; k += TILE) {
            Py_ssize_t num_k = k + TILE < stop ? TILE : stop - k;
            Py_ssize_t ahead = k + num_k;
            const float *to_fetch = panel + ahead * PANEL;
            if (ahead >= p->in_features)
                to_fetch = next;
            multiply_tile(p, p->x + k, panel + k * PANEL, sums, num_k, (const char *)to_fetch);
        }
        if (start > 0)
            add(whole, of_piece, p->num_rows * PANEL);
    }
    finish_panel(p, whole, first);
}

/* Of one thread. Each takes the next panel that nobody has, so that a slow one holds up nobody. */
static void multiply_panels(void *argument)
{
    Product *p = argument;
    Py_ssize_t index = __atomic_fetch_add(&p->next_panel, 1, __ATOMIC_RELAXED);
    while (index < p->num_panels) {
        Py_ssize_t next = __atomic_fetch_add(&p->next_panel, 1, __ATOMIC_RELAXED);
        const float *to_fetch = next < p->num_panels ? p->weight + next * p->panel_size : NULL;
        multiply_panel(p, p->weight + index * p->panel_size, to_fetch, index * PANEL);
        index = next;
    }
}

/* ── the module ───────────────────────────────────────────────────────────────────────────────── */

/* The sizes that the buffers imply; 0 if they do not fit together. */
static int measure(Product *p, const Py_buffer *x, const Py_buffer *weight, const Py_buffer *out,
                   const Py_buffer *bias, const Py_buffer *other)
{
    Py_ssize_t size = sizeof(float);
    if (p->in_features <= 0 || p->out_features <= 0 || p->in_features > (1 << 24)
        || p->out_features > (1 << 24) || p->op < NONE || p->op >= NUM_OPS)
        return 0;
    p->num_rows = x->len / (p->in_features * size);
    p->num_panels = (p->out_features + PANEL - 1) / PANEL;
    p->panel_size = (p->in_features + PADDED_TO - 1) / PADDED_TO * PADDED_TO * PANEL;
    return p->num_rows > 0 && p->num_rows <= MAX_ROWS && x->len == p->num_rows * p->in_features * size
           && weight->len == p->num_panels * p->panel_size * size && (uintptr_t)weight->buf % 32 == 0
           && !out->readonly && out->len == p->num_rows * p->out_features * size
           && (bias->buf == NULL || bias->len == p->out_features * size)
           && (p->op >= MUL) == (other->buf != NULL)
           && (other->buf == NULL || other->len == out->len);
}

static PyObject *multiply_rows(PyObject *module, PyObject *args)
{
    Py_buffer x, weight, out, bias, other;
    Product p = {0};
    int op, num_threads;
    if (!PyArg_ParseTuple(args, "y*y*w*z*z*nnii", &x, &weight, &out, &bias, &other, &p.in_features,
                          &p.out_features, &op, &num_threads))
        return NULL;
    p.op = (Op)op;
    int is_right = num_threads > 0 && measure(&p, &x, &weight, &out, &bias, &other);
    if (is_right) {
        p.x = x.buf;
        p.weight = weight.buf;
        p.out = out.buf;
        p.bias = bias.buf;
        p.other = other.buf;
        Py_BEGIN_ALLOW_THREADS
        run_on_threads(multiply_panels, &p, num_threads);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "rows, weight and result do not fit together");
    }
    PyBuffer_Release(&x);
    PyBuffer_Release(&weight);
    PyBuffer_Release(&out);
    if (bias.buf != NULL)
        PyBuffer_Release(&bias);
    if (other.buf != NULL)
        PyBuffer_Release(&other);
    if (!is_right)
        return NULL;
    Py_RETURN_NONE;
}

static int refuse_unless_supported(PyObject *module)
{
    const char *missing = missing_here();
    if (missing == NULL)
        return 0;
    PyErr_SetString(PyExc_ImportError, missing);
    return -1;
}

static PyMethodDef methods[] = {
    {"multiply_rows", multiply_rows, METH_VARARGS, "See _skinny_gemm.pyi."},
    {NULL, NULL, 0, NULL},
};

#else

static int refuse_unless_supported(PyObject *module)
{
    PyErr_SetString(PyExc_ImportError, "made for x86-64");
    return -1;
}

static PyMethodDef methods[] = {{NULL, NULL, 0, NULL}};

#endif

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, refuse_unless_supported},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_skinny_gemm", "Products of a few rows.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__skinny_gemm(void)
{
    return PyModuleDef_Init(&definition);
}
