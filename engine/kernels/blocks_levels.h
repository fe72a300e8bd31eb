/* blocks_target.h for each way to multiply bytes, and the choice between them. */

#define BLOCK_PREFETCH(rows) ((rows) > 2 ? 4096 : 1024) /* bytes ahead: more where rows take longer than memory */

/* The compiler's default target: in plain C. */
typedef uint8_t bytes16 __attribute__((vector_size(16), aligned(1)));

static inline bytes16 or_bit_4(bytes16 codes, const uint8_t *p) {
  for (int i = 0; i < 16; i++) codes[i] |= (p[i / 8] >> i % 8 & 1) << 4;
  return codes;
}

static inline bytes16 dot_plain(bytes16 sum, bytes16 codes, const int8_t *x) {
  int32_t sums[4];
  memcpy(sums, &sum, 16);
  for (int i = 0; i < 16; i++) sums[i / 4] += codes[i] * x[i % 4];
  memcpy(&sum, sums, 16);
  return sum;
}

#define SUFFIX _blocks
#define TARGET
#define LANES 4
#define BLOCK_ROWS 4
#define BYTES bytes16
#define ZERO ((BYTES){0})
#define LOAD_CODES(p) (*(const bytes16 *)(p))
#define AND(v, byte) ((v) & (uint8_t)(byte))
#define OR(v, w) ((v) | (w))
#define SHIFT_LEFT(v, n) ((v) << n)
#define SHIFT_RIGHT(v, n) ((v) >> n)
#define OR_BIT_4(codes, p) or_bit_4(codes, p)
#define STEPS_OF_PAIRS(f) 8
#define SIGNED_BYTES 0
#define DOT(f, sum, pairs, codes, x, last) ((void)(pairs), (void)(last), sum = dot_plain(sum, codes, x))
#define LOAD_FLOAT16(p)                                                                                                  \
  ((VEC){half_to_float(half_at(p)), half_to_float(half_at((p) + 2)), half_to_float(half_at((p) + 4)), half_to_float(half_at((p) + 6))})
#define LOAD_INT8(p) ((VEC){(p)[0], (p)[1], (p)[2], (p)[3]})
#define LOAD_UINT8(p) ((VEC){(p)[0], (p)[1], (p)[2], (p)[3]})
#include "blocks_target.h"

#include "blocks_undefine.h"

#if defined(__x86_64__)

/* AVX2, without and with AVX-VNNI's instruction for products of bytes. */
#define LANES 8
#define BLOCK_ROWS 4
#define BYTES __m256i
#define ZERO _mm256_setzero_si256()
#define LOAD_CODES(p) _mm256_loadu_si256((const __m256i *)(p))
#define AND(v, byte) _mm256_and_si256(v, _mm256_set1_epi8(byte))
#define OR(v, w) _mm256_or_si256(v, w)
#define SHIFT_LEFT(v, n) _mm256_slli_epi16(v, n) /* what comes from the next byte is masked afterwards */
#define SHIFT_RIGHT(v, n) _mm256_srli_epi16(v, n)
#define OR_BIT_4(codes, p) or_bit_4_avx2(codes, p)
#define LOAD_FLOAT16(p) ((VEC)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define LOAD_INT8(p) ((VEC)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))))
#define LOAD_UINT8(p) ((VEC)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))))

INLINE __attribute__((target("avx2,fma,f16c"))) __m256i or_bit_4_avx2(__m256i codes, const uint8_t *p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  const __m256i byte_of = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3,
                                           3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
  const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of), bit);
  return _mm256_or_si256(codes, _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(16)));
}

/* Pairs of products in 16 bits: 8 steps of 4-bit codes are at most 8 * 2 * 15 * 127, which fits; 8-bit codes need their sign
 * moved to the activations, for the first factor is unsigned and 2 * 255 * 127 would not fit. */
#define SUFFIX _blocks_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define STEPS_OF_PAIRS(f) ((f).bits == 4 ? 8 : (f).bits == 5 ? 4 : (f).bits == 6 ? 2 : 1)
#define SIGNED_BYTES 1
#define DOT(f, sum, pairs, codes, x, last)                                                                  \
  do {                                                                                                      \
    const __m256i four = _mm256_set1_epi32(*(const int32_t *)(x));                                          \
    __m256i products;                                                                                       \
    if ((f).bits == 8) {                                                                                    \
      const __m256i signed_codes = _mm256_xor_si256(codes, _mm256_set1_epi8((char)0x80));                   \
      products = _mm256_maddubs_epi16(_mm256_abs_epi8(signed_codes), _mm256_sign_epi8(four, signed_codes)); \
    } else {                                                                                                \
      products = _mm256_maddubs_epi16(codes, four);                                                         \
    }                                                                                                       \
    pairs = _mm256_add_epi16(pairs, products);                                                              \
    if (last) {                                                                                             \
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));                          \
      pairs = ZERO;                                                                                         \
    }                                                                                                       \
  } while (0)
#include "blocks_target.h"
#undef SUFFIX
#undef TARGET
#undef STEPS_OF_PAIRS
#undef SIGNED_BYTES
#undef DOT

#define STEPS_OF_PAIRS(f) 8
#define SIGNED_BYTES 0

#define SUFFIX _blocks_avx2_vnni
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define DOT(f, sum, pairs, codes, x, last) \
  ((void)(pairs), (void)(last), sum = _mm256_dpbusd_avx_epi32(sum, codes, _mm256_set1_epi32(*(const int32_t *)(x))))
#include "blocks_target.h"
#include "blocks_undefine.h"

#define STEPS_OF_PAIRS(f) 8
#define SIGNED_BYTES 0

#define SUFFIX _blocks_avx512_vnni
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vnni,fma")))
#define LANES 16
#define BLOCK_ROWS 8
#define BYTES __m512i
#define ZERO _mm512_setzero_si512()
#define LOAD_CODES(p) _mm512_loadu_si512(p)
#define AND(v, byte) _mm512_and_si512(v, _mm512_set1_epi8(byte))
#define OR(v, w) _mm512_or_si512(v, w)
#define SHIFT_LEFT(v, n) _mm512_slli_epi16(v, n)
#define SHIFT_RIGHT(v, n) _mm512_srli_epi16(v, n)
#define OR_BIT_4(codes, p) _mm512_or_si512(codes, _mm512_maskz_set1_epi8(*(const uint64_t *)(p), 16))
#define DOT(f, sum, pairs, codes, x, last) \
  ((void)(pairs), (void)(last), sum = _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(*(const int32_t *)(x))))
#define LOAD_FLOAT16(p) ((VEC)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define LOAD_INT8(p) ((VEC)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p)))))
#define LOAD_UINT8(p) ((VEC)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))))
#include "blocks_target.h"
#include "blocks_undefine.h"

/* Whether the processor multiplies bytes in one instruction, at this level. */
static int has_vnni(int level) {
  __builtin_cpu_init();
  if (level == 2) return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw");
  return level == 1 && __builtin_cpu_supports("avxvnni");
}

/* AVX-512 without VNNI multiplies as AVX2 does. */
#define PICK_BLOCKS(level, function)                                                                \
  ((level) == (2 | VNNI)   ? JOIN(function, _blocks_avx512_vnni)                                    \
   : (level) == (1 | VNNI) ? JOIN(function, _blocks_avx2_vnni)                                      \
   : ((level) & 3) ? JOIN(function, _blocks_avx2) : JOIN(function, _blocks))
#else
static int has_vnni(int level) { return (void)level, 0; }
#define PICK_BLOCKS(level, function) JOIN(function, _blocks)
#endif

/* VNNI if the processor has it at this level, else 0. */
EXPORT int pilotfish_vnni(int level) { return has_vnni(level) ? VNNI : 0; }

/* Whether any column has a scale that is not a finite number; it is packed all the same. rows: as the file has them. */
EXPORT int64_t pilotfish_pack_blocks(const uint8_t *rows, uint8_t *packed, int64_t kind, int64_t columns, int64_t in) {
  _Atomic int64_t infinite = 0;
  const struct pack_blocks a = {rows, packed, kind, columns, in, &infinite};
  parallel_for((columns + PANEL - 1) / PANEL, columns * in, pack_blocks, &a);
  return infinite;
}

/* Quantizes groups of GROUP values into blocks as a file has them: Q4_1 or Q8_0. */
EXPORT void pilotfish_fit_blocks(int level, const float *values, uint8_t *out, int64_t kind, int64_t groups) {
  const struct fit a = {values, out, kind};
  parallel_for(groups, groups * GROUP * (kind == Q4_1 ? 64 : 1), PICK_BLOCKS(level, fit), &a);
}

/* Bytes of a packed matrix; 0: the kind is not known, or has no blocks of such a size. `packed` begins as zeros. */
EXPORT int64_t pilotfish_block_bytes(int64_t kind, int64_t columns, int64_t in) {
  const struct form f = FORM_OF(kind);
  if (!f.bits || in % (f.scales >= SUPER ? GROUP * SUPER_GROUPS : GROUP)) return 0;
  return (columns + PANEL - 1) / PANEL * GROUP_PLACE(f, in / GROUP);
}

/* out[i] = row ids[i] of the packed matrix, which is in blocks or in 16 bits */
EXPORT void pilotfish_unpack_blocks(const uint8_t *packed, int64_t kind, const int64_t *ids, float *out, int64_t count,
                                    int64_t in) {
  const struct form f = FORM_OF(kind);
  for (int64_t i = 0; i < count; i++)
    if (is_blocks(kind)) unpack_row(f, packed, ids[i], in, out + i * in);
    else widen_row(kind, (const uint16_t *)packed, ids[i], in, out + i * in);
}

/* As pilotfish_linear, for a matrix in parts. space: rows * in / GROUP activations, if a part has blocks. */
EXPORT void pilotfish_linear_parts(int level, const float *x, const struct part *parts, int64_t count, const float *bias,
                                   const float *residual, float *out, int64_t rows, int64_t columns, int64_t in,
                                   struct activation *space) {
  const struct quantize q = {x, space, in};
  for (int64_t i = 0; i < count; i++)
    if (is_blocks(parts[i].kind)) {
      parallel_for(rows, rows * in * 4, PICK_BLOCKS(level, quantize), &q);
      break;
    }
  for (int64_t row = 0; row < rows; row += ROW_BLOCK) {
    const int64_t height = rows - row < ROW_BLOCK ? rows - row : ROW_BLOCK;
    for (int64_t i = 0; i < count; i++) {
      const struct part *p = parts + i;
      const float *added = bias ? bias + p->first : 0, *more = residual ? residual + row * columns + p->first : 0;
      float *to = out + row * columns + p->first;
      const int64_t panels = (p->columns + PANEL - 1) / PANEL, work = height * p->columns * in;
      if (!is_blocks(p->kind)) {
        const struct linear a = {x + row * in, p->packed, added, more, to, height, p->columns, in, columns};
        const range_function function = p->kind == F32   ? PICK(level, linear)
                                        : p->kind == FLOAT16 ? PICK_HALVES(level, linear_FLOAT16)
                                                         : PICK_HALVES(level, linear_BFLOAT16);
        parallel_for(panels, work, function, &a);
      } else {
        const struct linear_blocks a = {space + row * (in / GROUP), p->packed, added, more, to, height, p->columns, in,
                                        columns};
        parallel_for(panels, work / 4, PICK_BLOCKS(level, linear_of)(p->kind), &a);
      }
    }
  }
}
