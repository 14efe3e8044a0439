/* x Wᵀ for a few rows of float32, with the bits and the weights of oneDNN's inner product.

   At a handful of rows a product is as long in arithmetic as in reading the weights from memory, so
   both must go on at once: while one piece of a panel is multiplied out of the first cache, the next
   one is on its way there. The libraries do one after the other (docs/performance.md).

   Threads are those of the OpenMP runtime that torch has loaded; it is looked up in the process, for
   a second runtime's threads would wait in a loop on the cores of the first one's. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <dlfcn.h>
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define PANEL 64    /* output features side by side: [panels][in_features, padded][PANEL] */
#define PADDED_TO 16 /* in_features of a panel */
#define MAX_ROWS 32
#define PIECE 1024  /* in_features that are summed by themselves, one after the other */
#define TILE 32     /* of them, multiplied while the next ones are fetched: 8 KiB */
#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) AVX2

typedef enum { NONE, SWISH, MUL, ADD, NUM_OPS } Op;

typedef struct {
    const float *x, *weight, *bias, *other; /* bias and other may be NULL */
    float *out;
    Py_ssize_t num_rows, in_features, out_features;
    Op op;
    Py_ssize_t num_panels, panel_size, next_panel;
} Product;

/* ── sums ─────────────────────────────────────────────────────────────────────────────────────── */

/* Adds num_k products to sums[rows][PANEL], of 8 * num_vectors output features. */
INLINE void multiply(const Product *p, const float *x, const float *w, float *sums, Py_ssize_t num_k,
                     const char *ahead, Py_ssize_t lines_per_k, const int num_rows, const int num_vectors)
{
    __m256 sum[4][8];
#pragma GCC unroll 4
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; v++)
            sum[r][v] = _mm256_load_ps(sums + r * PANEL + 8 * v);
    for (Py_ssize_t k = 0; k < num_k; k++) {
        for (Py_ssize_t i = 0; i < lines_per_k; i++, ahead += 64)
            __builtin_prefetch(ahead, 0, 3);
        const float *from = w + k * PANEL;
        __m256 held[4]; /* the fewer: weights or factors */
        if (num_vectors < num_rows) {
#pragma GCC unroll 4
            for (int v = 0; v < num_vectors; v++)
                held[v] = _mm256_load_ps(from + 8 * v);
#pragma GCC unroll 4
            for (int r = 0; r < num_rows; r++) {
                __m256 factor = _mm256_broadcast_ss(x + r * p->in_features + k);
#pragma GCC unroll 4
                for (int v = 0; v < num_vectors; v++)
                    sum[r][v] = _mm256_fmadd_ps(factor, held[v], sum[r][v]);
            }
        } else {
#pragma GCC unroll 4
            for (int r = 0; r < num_rows; r++)
                held[r] = _mm256_broadcast_ss(x + r * p->in_features + k);
#pragma GCC unroll 8
            for (int v = 0; v < num_vectors; v++) {
                __m256 weights = _mm256_load_ps(from + 8 * v);
#pragma GCC unroll 4
                for (int r = 0; r < num_rows; r++)
                    sum[r][v] = _mm256_fmadd_ps(held[r], weights, sum[r][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; v++)
            _mm256_store_ps(sums + r * PANEL + 8 * v, sum[r][v]);
}

typedef void (*Multiply)(const Product *, const float *, const float *, float *, Py_ssize_t, const char *,
                         Py_ssize_t);

#define DEFINE_MULTIPLY(rows, vectors)                                                                  \
    AVX2 static void multiply_##rows##x##vectors(const Product *p, const float *x, const float *w,      \
                                                 float *sums, Py_ssize_t num_k, const char *ahead,      \
                                                 Py_ssize_t lines_per_k)                                \
    {                                                                                                   \
        multiply(p, x, w, sums, num_k, ahead, lines_per_k, rows, vectors);                              \
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

/* exp(x) for x <= 0 as oneDNN computes it: 2**n and a polynomial of degree five. */
INLINE __m256 exp_of_negative(__m256 x)
{
    __m256 least = _mm256_set1_ps(-0x1.5d58a0p+6f); /* of what is not 0 */
    __m256 is_zero = _mm256_cmp_ps(x, least, _CMP_LT_OS);
    x = _mm256_max_ps(x, least);
    __m256 n = _mm256_floor_ps(
        _mm256_add_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f)), _mm256_set1_ps(0.5f)));
    __m256 rest = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e430p-1f), x);
    __m256i exponent = _mm256_cvtps_epi32(_mm256_sub_ps(n, _mm256_set1_ps(1.0f)));
    exponent = _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23);
    __m256 half_power = _mm256_andnot_ps(is_zero, _mm256_castsi256_ps(exponent));
    static const float terms[5] = {0x1.0f9f9cp-7f, 0x1.573a1ap-5f, 0x1.555a80p-3f, 0x1.fffdc6p-2f,
                                   0x1.fffff6p-1f};
    __m256 y = _mm256_set1_ps(terms[0]);
    for (int i = 1; i < 5; i++)
        y = _mm256_fmadd_ps(y, rest, _mm256_set1_ps(terms[i]));
    y = _mm256_fmadd_ps(y, rest, _mm256_set1_ps(1.0f));
    return _mm256_mul_ps(_mm256_mul_ps(y, half_power), _mm256_set1_ps(2.0f));
}

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

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

static Parallel find_parallel(void)
{
    return (Parallel)(uintptr_t)dlsym(RTLD_DEFAULT, "GOMP_parallel");
}

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
        Parallel parallel = find_parallel();
        Py_BEGIN_ALLOW_THREADS
        if (num_threads == 1)
            multiply_panels(&p);
        else
            parallel(multiply_panels, &p, (unsigned)num_threads, 0);
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
    const char *missing = NULL;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        missing = "the processor has no AVX2";
    else if (find_parallel() == NULL)
        missing = "no OpenMP runtime is loaded";
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
