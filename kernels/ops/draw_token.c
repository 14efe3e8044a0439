/* A token drawn from one row of logits with top-p; see sampling_cpu.py, which does the same in numpy,
   and docs/sampling.md.

   Noise costs two logarithms, so only ids that can still win get it. -ln(-ln u) <= -ln(1 - u): an id
   whose score must be at least s to win needs 1 - u <= exp(z - s), and exp(z - max z) is its mass. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) AVX2
#define MASS_BITS 30
#define UNIT 0x1p-30 /* of mass */

typedef struct {
    const float *logits;
    const uint32_t *words; /* of each id: see token_words in sampling_cpu.py */
    int32_t *mass;         /* of each id, filled here */
    Py_ssize_t num_ids;
    uint32_t key; /* rotated */
    float temperature, top;
} Row;

/* ── mass ─────────────────────────────────────────────────────────────────────────────────────── */

/* exp(x) for -21 < x <= 0, so exact that rounding to float32 is right but for one in 10**7. */
INLINE __m128 exp_of_negative(__m128 x32)
{
    static const double terms[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                   1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,     0.5,
                                   1.0,            1.0};
    __m256d x = _mm256_cvtps_pd(x32);
    __m256d n = _mm256_round_pd(_mm256_mul_pd(x, _mm256_set1_pd(0x1.71547652b82fep+0)),
                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm256_fnmadd_pd(n, _mm256_set1_pd(0x1.62e42fefa39efp-1), x); /* ln 2, and the rest of it */
    x = _mm256_fnmadd_pd(n, _mm256_set1_pd(0x1.abc9e3b39803fp-56), x);
    __m256d y = _mm256_set1_pd(terms[0]);
#pragma GCC unroll 11
    for (int i = 1; i < 12; i++)
        y = _mm256_fmadd_pd(y, x, _mm256_set1_pd(terms[i]));
    __m256i exponent = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n));
    y = _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(y), _mm256_slli_epi64(exponent, 52)));
    return _mm256_cvtpd_ps(y);
}

INLINE __m256i mass_of(__m256 logits, const Row *row, __m256 temperature, __m256 highest)
{
    __m256 depth = _mm256_sub_ps(_mm256_div_ps(logits, temperature), highest);
    __m256 floor = _mm256_set1_ps(-20.9f); /* less than a unit */
    __m256 is_some = _mm256_cmp_ps(depth, floor, _CMP_GT_OQ);
    if (_mm256_movemask_ps(is_some) == 0)
        return _mm256_setzero_si256();
    depth = _mm256_max_ps(depth, floor);
    __m256 y = _mm256_set_m128(exp_of_negative(_mm256_extractf128_ps(depth, 1)),
                               exp_of_negative(_mm256_castps256_ps128(depth)));
    y = _mm256_and_ps(is_some, _mm256_mul_ps(y, _mm256_set1_ps(0x1p30f)));
    return _mm256_cvttps_epi32(y);
}

/* The ids of a vector that begins at `at`, for a row whose length is no multiple of eight. */
INLINE __m256i lanes(Py_ssize_t at, Py_ssize_t num_ids)
{
    Py_ssize_t left = num_ids - at;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left < 8 ? (int)left : 8),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* Those of `mask`, added to four sums. */
INLINE __m256i add_up(__m256i sums, __m256i mass, __m256i mask)
{
    mass = _mm256_and_si256(mass, mask);
    __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(mass));
    __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(mass, 1));
    return _mm256_add_epi64(sums, _mm256_add_epi64(low, high));
}

INLINE int64_t total(__m256i sums)
{
    int64_t parts[4];
    _mm256_storeu_si256((__m256i *)parts, sums);
    return parts[0] + parts[1] + parts[2] + parts[3];
}

/* Fills row->mass; the sum of it. */
AVX2 static int64_t weigh(const Row *row)
{
    __m256 temperature = _mm256_set1_ps(row->temperature);
    __m256 highest = _mm256_div_ps(_mm256_set1_ps(row->top), temperature);
    __m256i sums = _mm256_setzero_si256();
    for (Py_ssize_t i = 0; i < row->num_ids; i += 8) {
        __m256i mask = lanes(i, row->num_ids);
        __m256i mass = mass_of(_mm256_maskload_ps(row->logits + i, mask), row, temperature, highest);
        if (row->num_ids - i >= 8)
            _mm256_storeu_si256((__m256i *)(row->mass + i), mass);
        else
            _mm256_maskstore_epi32(row->mass + i, mask, mass);
        sums = add_up(sums, mass, mask);
    }
    return total(sums);
}

/* Which of the ids from `at` on come before id `end`, in order (larger logit first, then lower id). */
INLINE __m256i are_ahead(const Row *row, Py_ssize_t at, __m256 logits, Py_ssize_t end)
{
    __m256 of_end = _mm256_set1_ps(row->logits[end]);
    __m256i larger = _mm256_castps_si256(_mm256_cmp_ps(logits, of_end, _CMP_GT_OQ));
    if (at >= end)
        return larger;
    __m256i equal = _mm256_castps_si256(_mm256_cmp_ps(logits, of_end, _CMP_EQ_OQ));
    return _mm256_or_si256(larger, _mm256_and_si256(equal, lanes(at, end)));
}

AVX2 static int64_t mass_ahead(const Row *row, Py_ssize_t end)
{
    __m256i sums = _mm256_setzero_si256();
    for (Py_ssize_t i = 0; i < row->num_ids; i += 8) {
        __m256i mask = lanes(i, row->num_ids);
        __m256i ahead = are_ahead(row, i, _mm256_maskload_ps(row->logits + i, mask), end);
        ahead = _mm256_and_si256(ahead, mask);
        sums = add_up(sums, _mm256_maskload_epi32(row->mass + i, mask), ahead);
    }
    return total(sums);
}

/* ── the winner ───────────────────────────────────────────────────────────────────────────────── */

INLINE __m256i hash_words(__m256i words, uint32_t key)
{
    __m256i h = _mm256_xor_si256(words, _mm256_set1_epi32((int)key));
    h = _mm256_add_epi32(_mm256_add_epi32(h, _mm256_slli_epi32(h, 2)), _mm256_set1_epi32((int)0xE6546B64));
    h = _mm256_xor_si256(h, _mm256_set1_epi32(12));
    h = _mm256_xor_si256(h, _mm256_srli_epi32(h, 16));
    h = _mm256_mullo_epi32(h, _mm256_set1_epi32((int)0x85EBCA6B));
    h = _mm256_xor_si256(h, _mm256_srli_epi32(h, 13));
    h = _mm256_mullo_epi32(h, _mm256_set1_epi32((int)0xC2B2AE35));
    return _mm256_xor_si256(h, _mm256_srli_epi32(h, 16));
}

/* z + noise; `u`: the upper 24 bits of the hash. */
static float score_of(const Row *row, Py_ssize_t id, uint32_t u)
{
    return row->logits[id] / row->temperature + (float)-log(-log((u + 0.5) * 0x1p-24));
}

/* What 2**24 (1 - u) may be at most, per unit of mass, of an id that scores `score`. */
static float reach_of(const Row *row, float score)
{
    double slack = 1e-3 + fabs((double)score) * 1e-6; /* covers the rounding of scores */
    return (float)(exp((double)row->top / row->temperature - score + slack) * UNIT * 0x1p24 * 1.000001);
}

/* Of all ids, or of those before `end` where that is >= 0. `best`: one of them. */
AVX2 static Py_ssize_t pick(const Row *row, Py_ssize_t best, Py_ssize_t end)
{
    uint32_t rest[8];
    __m256i u = hash_words(_mm256_set1_epi32((int)row->words[best]), row->key);
    _mm256_storeu_si256((__m256i *)rest, _mm256_srli_epi32(u, 8));
    float score = score_of(row, best, rest[0]);
    __m256 reach = _mm256_set1_ps(reach_of(row, score));
    for (Py_ssize_t i = 0; i < row->num_ids; i += 8) {
        __m256i mask = lanes(i, row->num_ids);
        u = hash_words(_mm256_maskload_epi32((const int *)row->words + i, mask), row->key);
        u = _mm256_srli_epi32(u, 8);
        __m256i one = _mm256_set1_epi32(1); /* masses are rounded down */
        __m256i mass = _mm256_add_epi32(_mm256_maskload_epi32(row->mass + i, mask), one);
        __m256 left = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_set1_epi32((1 << 24) - 1), u));
        __m256 can_win = _mm256_cmp_ps(left, _mm256_mul_ps(_mm256_cvtepi32_ps(mass), reach), _CMP_LE_OQ);
        int bits = _mm256_movemask_ps(_mm256_and_ps(can_win, _mm256_castsi256_ps(mask)));
        if (bits == 0)
            continue;
        if (end >= 0)
            bits &= _mm256_movemask_ps(_mm256_castsi256_ps(
                are_ahead(row, i, _mm256_maskload_ps(row->logits + i, mask), end)));
        _mm256_storeu_si256((__m256i *)rest, u);
        for (; bits != 0; bits &= bits - 1) {
            int lane = __builtin_ctz((unsigned)bits);
            float other = score_of(row, i + lane, rest[lane]);
            if (other > score || (other == score && i + lane < best)) {
                score = other;
                best = i + lane;
                reach = _mm256_set1_ps(reach_of(row, score));
            }
        }
    }
    return best;
}

/* A wide nucleus has most of the probability, so the winner among all ids is usually in it, and then
   wins there too. If it is not, nothing behind it is either. */
static Py_ssize_t draw(const Row *row, Py_ssize_t likeliest, double top_p)
{
    double need = top_p * (double)weigh(row);
    Py_ssize_t winner = pick(row, likeliest, -1);
    while ((double)mass_ahead(row, winner) >= need)
        winner = pick(row, likeliest, winner);
    return winner;
}

/* ── the module ───────────────────────────────────────────────────────────────────────────────── */

static PyObject *draw_token(PyObject *module, PyObject *args)
{
    Py_buffer logits, words, mass;
    Row row = {0};
    Py_ssize_t likeliest, winner = -1;
    double top_p;
    unsigned int key;
    if (!PyArg_ParseTuple(args, "y*y*w*nIfd", &logits, &words, &mass, &likeliest, &key, &row.temperature,
                          &top_p))
        return NULL;
    row.num_ids = logits.len / (Py_ssize_t)sizeof(float);
    int is_right = logits.len == words.len && logits.len == mass.len && likeliest >= 0
                   && likeliest < row.num_ids && row.num_ids < INT32_MAX && row.temperature > 0 && top_p > 0 && top_p < 1
                   && logits.len % (Py_ssize_t)sizeof(float) == 0;
    if (is_right) {
        row.logits = logits.buf;
        row.words = words.buf;
        row.mass = mass.buf;
        row.key = key << 13 | key >> 19;
        row.top = row.logits[likeliest];
        Py_BEGIN_ALLOW_THREADS
        winner = draw(&row, likeliest, top_p);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "logits, words and masses do not fit together");
    }
    PyBuffer_Release(&logits);
    PyBuffer_Release(&words);
    PyBuffer_Release(&mass);
    return is_right ? PyLong_FromSsize_t(winner) : NULL;
}

static int refuse_unless_supported(PyObject *module)
{
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 0;
    PyErr_SetString(PyExc_ImportError, "the processor has no AVX2");
    return -1;
}

static PyMethodDef methods[] = {
    {"draw_token", draw_token, METH_VARARGS, "See _draw_token.pyi."},
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
    PyModuleDef_HEAD_INIT, "_draw_token", "Draws tokens.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__draw_token(void)
{
    return PyModuleDef_Init(&definition);
}
