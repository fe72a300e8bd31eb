/* CPU kernels in float32 for a decoder's forward pass over few rows, as decoding and verification have them.
 *
 * Plain C with GCC's vector extension, which clang has too: native_target.h is compiled for AVX-512, AVX2 and the
 * compiler's default target, and the best that the processor has is chosen when the library is loaded. Called through
 * ctypes by native.py, which checks shapes; nothing is checked here. No allocation; no state but the threads'.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "threads.h"

#define PANEL 16      /* columns of a packed panel */
#define VNNI 4        /* a flag of a level: blocks are multiplied by the instructions for it */
#define ROW_BLOCK 96  /* rows of a block: 96 rows of 1536 floats are 576 KiB, within a second-level cache */
#define INT8_WIDE 4   /* panels of int8 weights that one thread takes at a time */
#define PREFETCH 128  /* steps of k, 64 bytes each, that memory is asked ahead: about its latency times its bandwidth */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
/* The arguments of the kernels. Strides are in floats. */

struct linear {
  const float *x, *packed, *bias, *residual;
  float *out;
  int64_t rows, columns, in, stride; /* stride: of out and residual */
};

struct linear_int8 {
  const float *x;
  const int8_t *packed;
  const float *scale, *bias, *residual;
  float *out;
  int64_t rows, columns, in;
};

struct rms_norm {
  const float *x, *weight;
  float *out;
  int64_t row_stride, group_stride, groups, size;
  float eps;
};

struct gated {
  const float *gate_up; /* rows x (size of the gate, size of what it lets through) */
  float *out;
  int64_t size;
};

struct rotate {
  float *x; /* row, head, dim */
  const int64_t *positions;
  const float *cos_sin;
  int64_t row_stride, heads, dim;
};

struct mask {
  float *logits; /* rows x vocab */
  const int32_t *words; /* rows x row_words: bit i of word w for token 32 w + i */
  int64_t vocab, row_words;
};

#include "attention.h"

#include "low_rank.h"

#include "draw.h"

#include "blocks.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(x) JOIN(x, SUFFIX)

#define SUFFIX _default
#define TARGET
#define LOAD_BYTES(p) ((VEC){(p)[0], (p)[1], (p)[2], (p)[3]})
#define LANES 4
#define MAX_TILE 4
#include "native_target.h"
#include "low_rank_target.h"
#undef SUFFIX
#undef TARGET
#undef LOAD_BYTES
#undef LANES
#undef MAX_TILE

#if defined(__x86_64__)
#define SUFFIX _avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LOAD_BYTES(p) ((VEC)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))))
#define LANES 8
#define MAX_TILE 6
#include "native_target.h"
#include "low_rank_target.h"
#undef SUFFIX
#undef TARGET
#undef LOAD_BYTES
#undef LANES
#undef MAX_TILE

#define SUFFIX _avx512
#define TARGET __attribute__((target("avx512f,avx512dq,fma")))
#define LOAD_BYTES(p) ((VEC)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p)))))
#define LANES 16
#define MAX_TILE 12
#include "native_target.h"
#include "low_rank_target.h"
#undef SUFFIX
#undef TARGET
#undef LOAD_BYTES
#undef LANES
#undef MAX_TILE

/* 0: the default target; 1: AVX2; 2: AVX-512 */
static int best_level(void) {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return 2;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? 1 : 0;
}
#define PICK(level, kernel) \
  (((level) & 3) == 2 ? JOIN(kernel, _avx512) : ((level) & 3) == 1 ? JOIN(kernel, _avx2) : JOIN(kernel, _default))
#define PICK_HALVES(level, kernel)                     \
  (((level) & 3) == 2   ? JOIN(kernel, _halves_avx512) \
   : ((level) & 3) == 1 ? JOIN(kernel, _halves_avx2)   \
                        : JOIN(kernel, _halves))
#else
static int best_level(void) { return 0; }
#define PICK(level, kernel) JOIN(kernel, _default)
#define PICK_HALVES(level, kernel) JOIN(kernel, _halves)
#endif

#define EXPORT __attribute__((visibility("default")))

EXPORT int pilotfish_level(void) { return best_level(); }
EXPORT int64_t pilotfish_panel(void) { return PANEL; }

/* Returns how many threads there are: fewer than asked for where the system has no more. */
EXPORT int pilotfish_set_threads(int threads) { return set_threads(threads); }
EXPORT int pilotfish_threads(void) { return pool.threads; }

/* Lays weights of a type out in panels: the arguments, and the function that takes panels [begin, end). */
#define PACK(name, type)                                                                        \
  struct name {                                                                                 \
    const type *weight;                                                                         \
    type *packed;                                                                               \
    int64_t columns, in;                                                                        \
  };                                                                                            \
  static void name(const void *arguments, int64_t begin, int64_t end, int thread) {             \
    (void)thread;                                                                               \
    const struct name *a = arguments;                                                           \
    for (int64_t p = begin; p < end; p++)                                                       \
      for (int64_t k = 0; k < a->in; k++)                                                       \
        for (int64_t c = 0; c < PANEL; c++) {                                                   \
          const int64_t column = p * PANEL + c;                                                 \
          a->packed[(p * a->in + k) * PANEL + c] = column < a->columns ? a->weight[column * a->in + k] : 0; \
        }                                                                                       \
  }

/* What matters there is unrolled by hand, and -O3 takes six times as long to compile it. */
#pragma GCC push_options
#pragma GCC optimize("O2")
#include "halves_levels.h"
#include "blocks_levels.h"
#pragma GCC pop_options

PACK(pack, float)

/* weight (columns x in, row-major) -> panels of PANEL columns, [panel][k][PANEL], zero beyond the last column */
EXPORT void pilotfish_pack(const float *weight, float *packed, int64_t columns, int64_t in) {
  const struct pack a = {weight, packed, columns, in};
  parallel_for((columns + PANEL - 1) / PANEL, columns * in, pack, &a);
}

/* out[i] = row ids[i] of the weight that was packed: an embedding lookup in a tied head */
EXPORT void pilotfish_unpack_rows(const float *packed, const int64_t *ids, float *out, int64_t count, int64_t in) {
  for (int64_t i = 0; i < count; i++) {
    const float *panel = packed + ids[i] / PANEL * in * PANEL + ids[i] % PANEL;
    for (int64_t k = 0; k < in; k++) out[i * in + k] = panel[k * PANEL];
  }
}

/* Rows are taken in blocks that stay in the second-level cache while every panel passes by. */
EXPORT void pilotfish_linear(int level, const float *x, const float *packed, const float *bias, const float *residual,
                             float *out, int64_t rows, int64_t columns, int64_t in) {
  for (int64_t row = 0; row < rows; row += ROW_BLOCK) {
    const int64_t height = rows - row < ROW_BLOCK ? rows - row : ROW_BLOCK;
    const struct linear a = {x + row * in, packed, bias, residual ? residual + row * columns : 0, out + row * columns,
                             height, columns, in, columns};
    parallel_for((columns + PANEL - 1) / PANEL, height * columns * in, PICK(level, linear), &a);
  }
}

PACK(pack_int8, int8_t)

/* As pilotfish_pack. */
EXPORT void pilotfish_pack_int8(const int8_t *weight, int8_t *packed, int64_t columns, int64_t in) {
  const struct pack_int8 a = {weight, packed, columns, in};
  parallel_for((columns + PANEL - 1) / PANEL, columns * in, pack_int8, &a);
}

EXPORT void pilotfish_linear_int8(int level, const float *x, const int8_t *packed, const float *scale, const float *bias,
                                  const float *residual, float *out, int64_t rows, int64_t columns, int64_t in) {
  const struct linear_int8 a = {x, packed, scale, bias, residual, out, rows, columns, in};
  const int64_t panels = (columns + PANEL - 1) / PANEL;
  parallel_for((panels + INT8_WIDE - 1) / INT8_WIDE, rows * columns * in, PICK(level, linear_int8), &a);
}

EXPORT void pilotfish_rms_norm(int level, const float *x, int64_t row_stride, int64_t group_stride, const float *weight,
                               float *out, int64_t rows, int64_t groups, int64_t size, float eps) {
  const struct rms_norm a = {x, weight, out, row_stride, group_stride, groups, size, eps};
  parallel_for(rows * groups, rows * groups * size, PICK(level, rms_norm), &a);
}

EXPORT void pilotfish_silu_mul(int level, const float *gate_up, float *out, int64_t rows, int64_t size) {
  const struct gated a = {gate_up, out, size};
  parallel_for(rows, rows * size * 4, PICK(level, silu_mul), &a);
}

EXPORT void pilotfish_gelu_mul(int level, const float *gate_up, float *out, int64_t rows, int64_t size) {
  const struct gated a = {gate_up, out, size};
  parallel_for(rows, rows * size * 5, PICK(level, gelu_mul), &a);
}

EXPORT void pilotfish_rotate(int level, float *x, int64_t row_stride, const int64_t *positions, const float *cos_sin,
                             int64_t rows, int64_t heads, int64_t dim) {
  const struct rotate a = {x, positions, cos_sin, row_stride, heads, dim};
  parallel_for(rows, rows * heads * dim, PICK(level, rotate), &a);
}

/* -INFINITY for the logits whose bits are 0. */
EXPORT void pilotfish_mask(int level, float *logits, const int32_t *words, int64_t rows, int64_t vocab, int64_t row_words) {
  const struct mask a = {logits, words, vocab, row_words};
  parallel_for(rows, rows * vocab, PICK(level, mask), &a);
}

#include "attention_calls.h"
#include "draw_calls.h"

EXPORT int64_t pilotfish_max_tile(int level) { return PICK(level, max_tile); }

/* out += b . (a . x) for the rows that have an adapter; x rows x in, out rows x columns. */
EXPORT void pilotfish_low_rank(int level, const struct low_rank_linear *linear, const struct low_rank_pass *pass,
                               const float *x, float *out, int64_t in, int64_t columns) {
  const struct low_rank a = {linear, pass, x, out, in, columns};
  const int64_t items = pass->count * linear->most;
  parallel_for(items, items * (in + columns) * PANEL, PICK(level, low_rank), &a);
}

#include "decoder.h"
#include "experts.h"
#include "draft.h"

/* An importable module with nothing in it, so that Python's own machinery builds and finds the library. */
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "Loaded with ctypes by pilotfish.engine.kernels.native.", -1, NULL};
PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
