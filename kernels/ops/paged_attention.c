/* Attention over KV in blocks for float32, which is read where it lies; see paged_attention_cpu.py.

   A query's columns are taken by tiles that begin at multiples of TILE, whatever the blocks: the order
   of its sums depends on positions alone, so its bits depend on nothing but its own sequence. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <float.h>
#include <string.h>

#include "skinny.h"

#define TILE 64          /* columns */
#define MAX_HEADS 64     /* query heads per KV head; and rows, each a query and a head, at a time */
#define MAX_HEAD_DIM 256 /* a multiple of 8 */

typedef struct {
    int64_t start, num_queries, first_query, first_block; /* the latter two: in q and in blocks */
} Sequence;

typedef struct {
    const float *q, *kv; /* [queries][heads][head_dim]; [K, V][blocks][block_size][kv_heads][head_dim] */
    float *out;          /* like q */
    const Sequence *sequences;
    const int64_t *blocks;
    Py_ssize_t num_sequences, num_queries, num_block_ids, num_blocks;
    Py_ssize_t block_size, num_heads, num_kv_heads, head_dim, window;
    float scale;
    Py_ssize_t group_size, to_values; /* from a key to the value of its position */
    Py_ssize_t queries_per_unit, num_units, next_unit;
} Attention;

/* Some queries of a sequence, for the query heads that share a KV head. */
typedef struct {
    const Attention *a;
    const Sequence *sequence;
    Py_ssize_t kv_head, query, num_queries, num_rows; /* query: of the sequence */
    _Alignas(32) float q[MAX_HEADS * MAX_HEAD_DIM], sums[MAX_HEADS * MAX_HEAD_DIM];
    _Alignas(32) float keys[MAX_HEAD_DIM * TILE], weights[MAX_HEADS * TILE]; /* keys: [head_dim][TILE] */
    float highest[MAX_HEADS], total[MAX_HEADS];
    Py_ssize_t offsets[2 * TILE]; /* of the keys of this tile and the next one */
} Unit;

/* ── products ─────────────────────────────────────────────────────────────────────────────────── */

typedef void (*Multiply)(const float *, Py_ssize_t, const float *, Py_ssize_t, float *, Py_ssize_t,
                         Py_ssize_t);

#define DEFINE_MULTIPLY(rows, vectors)                                                                  \
    AVX2 static void multiply_##rows##x##vectors(const float *x, Py_ssize_t x_stride, const float *w,   \
                                                 Py_ssize_t w_stride, float *sums,                      \
                                                 Py_ssize_t sums_stride, Py_ssize_t num_k)              \
    {                                                                                                   \
        multiply(x, x_stride, w, w_stride, sums, sums_stride, num_k, NULL, 0, rows, vectors);           \
    }
#define DEFINE_MULTIPLIES(rows) DEFINE_MULTIPLY(rows, 1) DEFINE_MULTIPLY(rows, 2) DEFINE_MULTIPLY(rows, 3)
DEFINE_MULTIPLIES(1)
DEFINE_MULTIPLIES(2)
DEFINE_MULTIPLIES(3)
DEFINE_MULTIPLIES(4)

#define OF_ROWS(rows) {NULL, multiply_##rows##x1, multiply_##rows##x2, multiply_##rows##x3}
static const Multiply multiplies[5][4] = {{NULL}, OF_ROWS(1), OF_ROWS(2), OF_ROWS(3), OF_ROWS(4)};

/* sums[num_rows][8 * num_vectors] += x[num_rows][num_k] w[num_k][8 * num_vectors] */
static void multiply_all(const float *x, Py_ssize_t x_stride, Py_ssize_t num_rows, const float *w,
                         Py_ssize_t w_stride, float *sums, Py_ssize_t sums_stride, Py_ssize_t num_k,
                         Py_ssize_t num_vectors)
{
    for (Py_ssize_t r = 0; r < num_rows; r += 4) {
        Py_ssize_t rows = num_rows - r < 4 ? num_rows - r : 4;
        for (Py_ssize_t v = 0; v < num_vectors; v += 3) {
            Py_ssize_t vectors = num_vectors - v < 3 ? num_vectors - v : 3;
            multiplies[rows][vectors](x + r * x_stride, x_stride, w + 8 * v, w_stride,
                                      sums + r * sums_stride + 8 * v, sums_stride, num_k);
        }
    }
}

/* ── a tile ───────────────────────────────────────────────────────────────────────────────────── */

/* Offsets of the keys at [first, first + TILE), as far as the context goes, to `offsets`. */
static void locate(const Unit *u, Py_ssize_t first, Py_ssize_t context_len, Py_ssize_t *offsets)
{
    const Attention *a = u->a;
    const int64_t *block = a->blocks + u->sequence->first_block + first / a->block_size;
    Py_ssize_t slot = first % a->block_size;
    for (Py_ssize_t i = 0; i < TILE && first + i < context_len; i++) {
        offsets[i] = ((*block * a->block_size + slot) * a->num_kv_heads + u->kv_head) * a->head_dim;
        if (++slot == a->block_size) {
            slot = 0;
            block++;
        }
    }
}

INLINE void transpose(__m256 row[8])
{
    __m256 pair[8], quad[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        row[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
        row[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
    }
}

static void fetch(const float *from, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i += 16)
        __builtin_prefetch(from + i, 0, 3);
}

/* Keys of the tile at `first` as columns; those past `num_columns` repeat the last. What is read next
   is fetched beside: values of this tile, and keys of the next one. */
AVX2 static void load_keys(Unit *u, Py_ssize_t first, Py_ssize_t num_columns, Py_ssize_t context_len)
{
    const Attention *a = u->a;
    Py_ssize_t head_dim = a->head_dim;
    for (Py_ssize_t column = 0; column < num_columns; column += 8) {
        const float *keys[8];
        for (Py_ssize_t i = 0; i < 8; i++) {
            Py_ssize_t at = column + i < num_columns ? column + i : num_columns - 1;
            keys[i] = a->kv + u->offsets[at];
            fetch(keys[i] + a->to_values, head_dim);
            if (first + at + TILE < context_len)
                fetch(a->kv + u->offsets[at + TILE], head_dim);
        }
        for (Py_ssize_t d = 0; d < head_dim; d += 8) {
            __m256 row[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
                row[i] = _mm256_loadu_ps(keys[i] + d);
            transpose(row);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
                _mm256_store_ps(u->keys + (d + i) * TILE + column, row[i]);
        }
    }
}

INLINE float reduce_max(__m256 x)
{
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}

INLINE float reduce_add(__m256 x)
{
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}

INLINE __m256 are_seen(Py_ssize_t column, Py_ssize_t from, Py_ssize_t to)
{
    __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32((int)column));
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)from), lane),
                                                   _mm256_cmpgt_epi32(_mm256_set1_epi32((int)to), lane)));
}

/* Scores of one row become weights relative to the highest so far. It sees columns [from, to). */
AVX2 static void weigh(Unit *u, Py_ssize_t r, Py_ssize_t from, Py_ssize_t to, Py_ssize_t num_columns)
{
    float *weights = u->weights + r * TILE, *sums = u->sums + r * u->a->head_dim;
    __m256 lowest = _mm256_set1_ps(-FLT_MAX), best = lowest;
    for (Py_ssize_t i = 0; i < num_columns; i += 8)
        best = _mm256_max_ps(
            best, _mm256_blendv_ps(lowest, _mm256_load_ps(weights + i), are_seen(i, from, to)));
    float highest = reduce_max(best);
    if (highest > u->highest[r]) {
        __m256 change = exp_of_negative(_mm256_set1_ps(u->highest[r] - highest));
        for (Py_ssize_t d = 0; d < u->a->head_dim; d += 8)
            _mm256_store_ps(sums + d, _mm256_mul_ps(_mm256_load_ps(sums + d), change));
        u->total[r] *= _mm256_cvtss_f32(change);
        u->highest[r] = highest;
    }
    __m256 all = _mm256_setzero_ps(), top = _mm256_set1_ps(u->highest[r]);
    for (Py_ssize_t i = 0; i < num_columns; i += 8) {
        __m256 weight = exp_of_negative(_mm256_sub_ps(_mm256_load_ps(weights + i), top));
        weight = _mm256_and_ps(weight, are_seen(i, from, to));
        _mm256_store_ps(weights + i, weight);
        all = _mm256_add_ps(all, weight);
    }
    u->total[r] += reduce_add(all);
}

static void attend_tile(Unit *u, Py_ssize_t first, Py_ssize_t context_len)
{
    const Attention *a = u->a;
    Py_ssize_t head_dim = a->head_dim;
    Py_ssize_t num_columns = context_len - first < TILE ? context_len - first : TILE;
    Py_ssize_t whole = (num_columns + 7) / 8 * 8;
    load_keys(u, first, num_columns, context_len);
    memset(u->weights, 0, (size_t)(u->num_rows * TILE) * sizeof(float));
    multiply_all(u->q, head_dim, u->num_rows, u->keys, TILE, u->weights, TILE, head_dim, whole / 8);
    for (Py_ssize_t r = 0; r < u->num_rows; r++) {
        Py_ssize_t position = u->sequence->start + u->query + r / a->group_size;
        Py_ssize_t from = a->window ? position - a->window + 1 - first : 0, to = position + 1 - first;
        if (to <= 0 || from >= whole)
            memset(u->weights + r * TILE, 0, TILE * sizeof(float));
        else
            weigh(u, r, from < 0 ? 0 : from, to < whole ? to : whole, whole);
    }
    Py_ssize_t stride = a->num_kv_heads * head_dim;
    for (Py_ssize_t column = 0, next = 1; column < num_columns; column = next++) {
        while (next < num_columns && u->offsets[next] == u->offsets[next - 1] + stride)
            next++;
        multiply_all(u->weights + column, TILE, u->num_rows, a->kv + u->offsets[column] + a->to_values,
                     stride, u->sums, head_dim, next - column, head_dim / 8);
    }
}

/* ── units ────────────────────────────────────────────────────────────────────────────────────── */

static void attend(Unit *u)
{
    const Attention *a = u->a;
    Py_ssize_t head_dim = a->head_dim;
    u->num_rows = u->num_queries * a->group_size;
    for (Py_ssize_t r = 0; r < u->num_rows; r++) {
        Py_ssize_t query = u->sequence->first_query + u->query + r / a->group_size;
        Py_ssize_t head = u->kv_head * a->group_size + r % a->group_size;
        const float *q = a->q + (query * a->num_heads + head) * head_dim;
        for (Py_ssize_t d = 0; d < head_dim; d++)
            u->q[r * head_dim + d] = q[d] * a->scale;
        u->highest[r] = -FLT_MAX;
        u->total[r] = 0;
    }
    memset(u->sums, 0, (size_t)(u->num_rows * head_dim) * sizeof(float));
    Py_ssize_t start = u->sequence->start + u->query, context_len = start + u->num_queries;
    Py_ssize_t first = a->window && start >= a->window ? (start - a->window + 1) / TILE * TILE : 0;
    locate(u, first, context_len, u->offsets);
    for (; first < context_len; first += TILE) {
        if (first + TILE < context_len)
            locate(u, first + TILE, context_len, u->offsets + TILE);
        attend_tile(u, first, context_len);
        memcpy(u->offsets, u->offsets + TILE, TILE * sizeof(*u->offsets));
    }
    for (Py_ssize_t r = 0; r < u->num_rows; r++) {
        Py_ssize_t query = u->sequence->first_query + u->query + r / a->group_size;
        Py_ssize_t head = u->kv_head * a->group_size + r % a->group_size;
        float *out = a->out + (query * a->num_heads + head) * head_dim;
        for (Py_ssize_t d = 0; d < head_dim; d++)
            out[d] = u->sums[r * head_dim + d] / u->total[r];
    }
}

/* Of one thread: units in order, the next that nobody has. */
static void attend_units(void *argument)
{
    Attention *a = argument;
    Unit u;
    u.a = a;
    Py_ssize_t sequence = 0, before = 0; /* units of the sequences before this one */
    for (;;) {
        Py_ssize_t index = __atomic_fetch_add(&a->next_unit, 1, __ATOMIC_RELAXED);
        if (index >= a->num_units)
            return;
        Py_ssize_t parts;
        for (;; sequence++, before += parts * a->num_kv_heads) {
            Py_ssize_t num_queries = a->sequences[sequence].num_queries;
            parts = (num_queries + a->queries_per_unit - 1) / a->queries_per_unit;
            if (index < before + parts * a->num_kv_heads)
                break;
        }
        u.sequence = &a->sequences[sequence];
        u.kv_head = (index - before) % a->num_kv_heads;
        /* the last queries see most: first */
        u.query = (parts - 1 - (index - before) / a->num_kv_heads) * a->queries_per_unit;
        Py_ssize_t left = u.sequence->num_queries - u.query;
        u.num_queries = left < a->queries_per_unit ? left : a->queries_per_unit;
        attend(&u);
    }
}

/* ── the module ───────────────────────────────────────────────────────────────────────────────── */

/* Nothing is touched that is not inside the buffers. */
static int is_inside(Attention *a)
{
    a->num_units = 0;
    for (Py_ssize_t i = 0; i < a->num_sequences; i++) {
        const Sequence *s = &a->sequences[i];
        if (s->start < 0 || s->num_queries <= 0 || s->first_query < 0 || s->first_block < 0
            || s->start > INT32_MAX || s->num_queries > a->num_queries
            || s->first_query > a->num_queries - s->num_queries)
            return 0;
        Py_ssize_t num_blocks = (s->start + s->num_queries + a->block_size - 1) / a->block_size;
        if (num_blocks > a->num_block_ids || s->first_block > a->num_block_ids - num_blocks)
            return 0;
        Py_ssize_t parts = (s->num_queries + a->queries_per_unit - 1) / a->queries_per_unit;
        a->num_units += parts * a->num_kv_heads;
    }
    for (Py_ssize_t i = 0; i < a->num_block_ids; i++)
        if (a->blocks[i] < 0 || a->blocks[i] >= a->num_blocks)
            return 0;
    return 1;
}

/* The sizes that the buffers imply; 0 if they do not fit together. */
static int measure(Attention *a, const Py_buffer *q, const Py_buffer *kv, const Py_buffer *out,
                   const Py_buffer *sequences, const Py_buffer *blocks)
{
    Py_ssize_t size = sizeof(float);
    if (a->block_size <= 0 || a->block_size > (1 << 20) || a->num_kv_heads <= 0 || a->num_heads <= 0
        || a->num_heads > (1 << 16) || a->num_heads % a->num_kv_heads || a->head_dim <= 0 || a->head_dim % 8
        || a->head_dim > MAX_HEAD_DIM || a->window < 0)
        return 0;
    a->group_size = a->num_heads / a->num_kv_heads;
    if (a->group_size > MAX_HEADS)
        return 0;
    a->queries_per_unit = MAX_HEADS / a->group_size;
    Py_ssize_t query_bytes = a->num_heads * a->head_dim * size;
    Py_ssize_t block_bytes = a->block_size * a->num_kv_heads * a->head_dim * size;
    a->num_queries = q->len / query_bytes;
    a->num_blocks = kv->len / 2 / block_bytes;
    a->to_values = kv->len / 2 / size;
    a->num_sequences = sequences->len / (Py_ssize_t)sizeof(Sequence);
    a->num_block_ids = blocks->len / (Py_ssize_t)sizeof(int64_t);
    a->q = q->buf;
    a->kv = kv->buf;
    a->out = out->buf;
    a->sequences = sequences->buf;
    a->blocks = blocks->buf;
    return !out->readonly && out->len == q->len && q->len == a->num_queries * query_bytes
           && kv->len == a->num_blocks * 2 * block_bytes
           && sequences->len == a->num_sequences * (Py_ssize_t)sizeof(Sequence)
           && blocks->len % 8 == 0 && is_inside(a);
}

static PyObject *attend_rows(PyObject *module, PyObject *args)
{
    Py_buffer q, kv, out, sequences, blocks;
    Attention a = {0};
    int num_threads;
    if (!PyArg_ParseTuple(args, "y*y*w*y*y*nnnnnfi", &q, &kv, &out, &sequences, &blocks, &a.block_size,
                          &a.num_heads, &a.num_kv_heads, &a.head_dim, &a.window, &a.scale, &num_threads))
        return NULL;
    int is_right = num_threads > 0 && measure(&a, &q, &kv, &out, &sequences, &blocks);
    if (is_right) {
        Py_BEGIN_ALLOW_THREADS
        run_on_threads(attend_units, &a, num_threads);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "queries, KV and rows do not fit together");
    }
    PyBuffer_Release(&q);
    PyBuffer_Release(&kv);
    PyBuffer_Release(&out);
    PyBuffer_Release(&sequences);
    PyBuffer_Release(&blocks);
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
    {"attend_rows", attend_rows, METH_VARARGS, "See _paged_attention.pyi."},
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
    PyModuleDef_HEAD_INIT, "_paged_attention", "Attention over KV in blocks.", 0, methods, slots, NULL, NULL,
    NULL,
};

PyMODINIT_FUNC PyInit__paged_attention(void)
{
    return PyModuleDef_Init(&definition);
}
