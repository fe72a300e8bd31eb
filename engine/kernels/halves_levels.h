/* halves_target.h for each instruction set; and packing such matrices. */

static inline float bfloat16_to_float(uint16_t h) {
  const union {
    uint32_t bits;
    float value;
  } found = {(uint32_t)h << 16};
  return found.value;
}

#define SUFFIX _halves
#define TARGET
#define LANES 4
#define MAX_TILE 4
#define LOAD_FLOAT16(p) ((VEC){half_to_float((p)[0]), half_to_float((p)[1]), half_to_float((p)[2]), half_to_float((p)[3])})
#define LOAD_BFLOAT16(p) ((VEC)((IVEC){(p)[0], (p)[1], (p)[2], (p)[3]} << 16))
#include "halves_target.h"

#if defined(__x86_64__)
#define SUFFIX _halves_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define MAX_TILE 6
#define LOAD_FLOAT16(p) ((VEC)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define LOAD_BFLOAT16(p) ((VEC)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#include "halves_target.h"

#define SUFFIX _halves_avx512
#define TARGET __attribute__((target("avx512f,avx512dq,fma")))
#define LANES 16
#define MAX_TILE 12
#define LOAD_FLOAT16(p) ((VEC)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define LOAD_BFLOAT16(p) ((VEC)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#include "halves_target.h"
#endif

PACK(pack_halves, uint16_t)

/* As pilotfish_pack, of 16-bit numbers of any kind. */
EXPORT void pilotfish_pack_halves(const uint16_t *rows, uint16_t *packed, int64_t columns, int64_t in) {
  const struct pack_halves a = {rows, packed, columns, in};
  parallel_for((columns + PANEL - 1) / PANEL, columns * in, pack_halves, &a);
}

/* The values of one row of a packed matrix. */
static void widen_row(int64_t kind, const uint16_t *packed, int64_t row, int64_t in, float *out) {
  const uint16_t *panel = packed + row / PANEL * in * PANEL + row % PANEL;
  for (int64_t k = 0; k < in; k++) {
    const uint16_t h = panel[k * PANEL];
    out[k] = kind == FLOAT16 ? half_to_float(h) : bfloat16_to_float(h);
  }
}
