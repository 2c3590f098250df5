// The arithmetic of NF4, one function for one rounding rule, the same on a GPU and on a CPU.
//
//     weight = code[index] * absmax           absmax = code2[absmax8] * absmax2 + offset
//
// Every product, sum and quotient is rounded to float32 by itself. A fused multiply-add, which both
// nvcc and g++ would form, gives other bits than bitsandbytes, so the GPU side names the roundings
// and the CPU side is compiled with -ffp-contract=off. The tests run this header and the kernels of
// nf4.cu on a CPU and compare every bit with the Python reference.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define NF4_BOTH __host__ __device__ __forceinline__
#else
#define NF4_BOTH inline
#endif

namespace nf4 {

constexpr int NESTED = 256;  // scales that share one absmax2
constexpr int CELLS = 32;

NF4_BOTH float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

NF4_BOTH float sum(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

NF4_BOTH uint32_t bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
#endif
}

NF4_BOTH float number(uint32_t b) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(b);
#else
  float x;
  std::memcpy(&x, &b, 4);
  return x;
#endif
}

// absmax of a block whose scale is stored in 8 bits.
NF4_BOTH float scale(float code2, float absmax2, float offset) {
  return sum(product(code2, absmax2), offset);
}

// 1 / largest, correctly rounded; of a block of zeros a large finite number.
NF4_BOTH float reciprocal(float largest) {
  const float divisor = largest > 1e-38f ? largest : 1e-38f;
#ifdef __CUDA_ARCH__
  return __fdiv_rn(1.0f, divisor);
#else
  return 1.0f / divisor;
#endif
}

// Magnitudes compare as these do, and a NaN is above them all.
NF4_BOTH uint32_t magnitude(float x) { return bits(x) & 0x7fffffffu; }

// Which of 32 cells, 1/15 wide, v in [-1, 1] falls into. 1.5 * 2^23 + 16 rounds 15 v + 16 to an
// integer in the lowest bits of the sum. Any monotone cell() would do: see Cells.
NF4_BOTH uint32_t cell(float v) { return bits(sum(product(v, 15.0f), 12582928.0f)) & (CELLS - 1); }

// The bound halfway between two codes.
NF4_BOTH float bound(float a, float b) { return product(sum(a, b), 0.5f); }

// The code of v is how many of the 15 bounds are below it. No cell holds two bounds (the nearest
// are 0.08 apart), so that is the bounds in earlier cells and perhaps the cell's own.
struct Cells {
  float own[CELLS];        // the bound in each cell, or infinity
  uint32_t earlier[CELLS];  // how many bounds lie in the cells before
};

inline Cells make_cells(const float* code) {
  Cells cells;
  for (int i = 0; i < CELLS; ++i) {
    cells.own[i] = number(0x7f800000u);
    cells.earlier[i] = 0;
  }
  for (int i = 0; i < 15; ++i) {
    const uint32_t at = cell(bound(code[i], code[i + 1]));
    cells.own[at] = bound(code[i], code[i + 1]);
    for (uint32_t later = at + 1; later < CELLS; ++later) ++cells.earlier[later];
  }
  return cells;
}

// The 8-bit code nearest to v: how many of the 255 bounds are below it, searched in halves.
NF4_BOTH uint32_t nearest(float v, const float* code2) {
  uint32_t index = 0;
  for (uint32_t step = 128; step > 0; step /= 2) {
    const uint32_t i = index + step - 1;
    index += v > bound(code2[i], code2[i + 1]) ? step : 0;
  }
  return index;
}

// Two numbers rounded to half precision, the first in the lower half.
template <typename T>
NF4_BOTH uint32_t pair(float a, float b);

struct Bfloat16 {
  uint16_t raw;
};
struct Half {
  uint16_t raw;
};

#ifdef __CUDACC__
template <>
NF4_BOTH uint32_t pair<Bfloat16>(float a, float b) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(two);
}
template <>
NF4_BOTH uint32_t pair<Half>(float a, float b) {
  const __half2 two = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(two);
}
NF4_BOTH float wide(Half x) { return __half2float(reinterpret_cast<const __half&>(x)); }
#else
inline uint32_t rounded(float x, Bfloat16*) {
  const uint32_t b = bits(x);
  return magnitude(x) > 0x7f800000u ? 0x7fff : (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}
inline uint32_t rounded(float x, Half*) {
  const _Float16 h = static_cast<_Float16>(x);
  uint16_t raw;
  std::memcpy(&raw, &h, 2);
  return raw;
}
template <typename T>
inline uint32_t pair(float a, float b) {
  return rounded(a, static_cast<T*>(nullptr)) | rounded(b, static_cast<T*>(nullptr)) << 16;
}
inline float wide(Half x) {
  _Float16 h;
  std::memcpy(&h, &x.raw, 2);
  return static_cast<float>(h);
}
#endif
NF4_BOTH float wide(Bfloat16 x) { return number(static_cast<uint32_t>(x.raw) << 16); }
NF4_BOTH float wide(float x) { return x; }

}  // namespace nf4
