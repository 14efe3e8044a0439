/* What skinny_gemm.c and paged_attention.c share: products of a few rows in AVX2, the exponential, and
   the threads of the OpenMP runtime that torch has loaded. It is looked up in the process, for a
   second runtime's threads would wait in a loop on the cores of the first one's. */

#include <dlfcn.h>
#include <immintrin.h>
#include <stdint.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) AVX2

/* sums[num_rows][8 * num_vectors] += x[num_rows][num_k] w[num_k][8 * num_vectors], one k after the other,
   and lines_per_k lines from `ahead` on are fetched beside each. The numbers of rows and vectors are
   constants where this is inlined; together they fill the sixteen registers. */
INLINE void multiply(const float *x, Py_ssize_t x_stride, const float *w, Py_ssize_t w_stride, float *sums,
                     Py_ssize_t sums_stride, Py_ssize_t num_k, const char *ahead, Py_ssize_t lines_per_k,
                     const int num_rows, const int num_vectors)
{
    __m256 sum[4][8];
#pragma GCC unroll 4
    for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < num_vectors; v++)
            sum[r][v] = _mm256_loadu_ps(sums + r * sums_stride + 8 * v);
    for (Py_ssize_t k = 0; k < num_k; k++) {
        for (Py_ssize_t i = 0; i < lines_per_k; i++, ahead += 64)
            __builtin_prefetch(ahead, 0, 3);
        const float *from = w + k * w_stride;
        __m256 held[4]; /* the fewer: weights or factors */
        if (num_vectors < num_rows) {
#pragma GCC unroll 4
            for (int v = 0; v < num_vectors; v++)
                held[v] = _mm256_loadu_ps(from + 8 * v);
#pragma GCC unroll 4
            for (int r = 0; r < num_rows; r++) {
                __m256 factor = _mm256_broadcast_ss(x + r * x_stride + k);
#pragma GCC unroll 4
                for (int v = 0; v < num_vectors; v++)
                    sum[r][v] = _mm256_fmadd_ps(factor, held[v], sum[r][v]);
            }
        } else {
#pragma GCC unroll 4
            for (int r = 0; r < num_rows; r++)
                held[r] = _mm256_broadcast_ss(x + r * x_stride + k);
#pragma GCC unroll 8
            for (int v = 0; v < num_vectors; v++) {
                __m256 weights = _mm256_loadu_ps(from + 8 * v);
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
            _mm256_storeu_ps(sums + r * sums_stride + 8 * v, sum[r][v]);
}

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

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

static Parallel find_parallel(void)
{
    return (Parallel)(uintptr_t)dlsym(RTLD_DEFAULT, "GOMP_parallel");
}

static void run_on_threads(void (*work)(void *), void *argument, int num_threads)
{
    if (num_threads == 1)
        work(argument);
    else
        find_parallel()(work, argument, (unsigned)num_threads, 0);
}

/* What this machine lacks, or NULL. */
static const char *missing_here(void)
{
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return "the processor has no AVX2";
    return find_parallel() == NULL ? "no OpenMP runtime is loaded" : NULL;
}
