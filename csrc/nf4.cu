// NF4 in CUDA C++: decode of one or several weights into a pitched buffer, and quantising at load.
//
// A plain C interface: addresses, sizes and a stream in, a cudaError out; Python calls it through
// ctypes (fastsft_kernels/cuda_ops). The arithmetic is in nf4.cuh.
//
// Decode. A block of 128 threads writes a tile of 4096 weights: 2^s columns, as many rows as make
// up the tile. A thread takes a word of eight codes, so that the word's eight weights have one
// scale and fill a 16-byte store, and neighbouring lanes load and store side by side. The table of
// 16 values lives in registers: lane i holds value i % 16, and __shfl_sync looks up. It reads the
// lowest five bits of a lane number, and since the table stands there twice the fifth does not
// matter: code j of a word costs one shift and one shuffle, no mask and no address. The load units
// serve 32 lanes a cycle for shuffles and for loads from shared memory alike, a quarter of the
// cycles in which memory takes the weights (34 us for 14336 x 4096 at 4.3 TB/s).
//
// Loads are 4 bytes a lane, 128 contiguous bytes a warp, four in flight: 16 bytes a lane would put a
// lane's weights 64 bytes apart from its neighbour's, and sorting them out takes the shuffles twice.
#include "nf4.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, stream, ...) \
  kernel<<<grid, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace {

constexpr int FASTSFT_ABI = 1;   // counts up with every change of a signature below
constexpr int FASTSFT_MOST = 8;  // weights of one launch
constexpr int THREADS = 128;
constexpr int STEPS = 8;      // words a thread decodes, in as many rows
constexpr int WIDEST = 1024;  // columns of a tile: a word for each thread
constexpr unsigned ALL = 0xffffffffu;

}  // namespace

extern "C" struct fastsft_nf4 {
  const uint8_t* packed;
  const void* absmax;    // uint8 codes into code2; float32 where absmax2 is null
  const float* absmax2;  // one for 256 blocks, or null
  const float* offset;
  const float* code;
  const float* code2;
  long long rows;
};

namespace {

struct Decode {
  fastsft_nf4 weights[FASTSFT_MOST];
  int count;
  int first;        // the strip of b that belongs to weights[0]
  int block_shift;  // log2 of the numbers in a block
  int wide_shift;   // log2 of the columns of a tile
  int columns;
  void* out;
  long long pitch;
  int tail;
  const void* b;
  long long b_pitch;
  int rank;
};

// How many rows a tile of 2^wide_shift columns has.
NF4_BOTH int tile_rows(int wide_shift) { return (STEPS * WIDEST) >> wide_shift; }

// What a block of threads has to do: `left` rows from `row` on of weights[which].
struct Place {
  int which;
  int left;
  long long row;
  long long to;  // that row in out
};

__device__ __forceinline__ Place locate(const Decode& d) {
  const int high = tile_rows(d.wide_shift);
  Place at = {0, 0, static_cast<long long>(blockIdx.z * gridDim.y + blockIdx.y) * high, 0};
  long long rows = d.weights[0].rows;
  while (at.row >= rows && at.which + 1 < d.count) {
    // Tiles do not run from one weight into the next.
    at.row -= (rows + high - 1) / high * high;
    at.to += rows;
    rows = d.weights[++at.which].rows;
  }
  at.to += at.row;
  at.left = static_cast<int>(max(0LL, min(rows - at.row, static_cast<long long>(high))));
  return at;
}

// Scales from block `base` on, in 32-bit arithmetic from there.
template <bool Nested>
struct Scales {
  const uint8_t* codes;
  const float* plain;
  const float* absmax2;
  const float* code2;
  float offset;
  unsigned nested;

  __device__ __forceinline__ Scales(const fastsft_nf4& w, unsigned long long base)
      : codes(static_cast<const uint8_t*>(w.absmax) + base),
        plain(static_cast<const float*>(w.absmax) + base),
        absmax2(w.absmax2 + base / nf4::NESTED),
        code2(w.code2),
        offset(Nested ? __ldg(w.offset) : 0.0f),
        nested(static_cast<unsigned>(base % nf4::NESTED)) {}

  __device__ __forceinline__ float operator[](unsigned i) const {
    if (!Nested) return __ldg(plain + i);
    return nf4::scale(
        __ldg(code2 + __ldg(codes + i)), __ldg(absmax2 + (nested + i) / nf4::NESTED), offset);
  }
};

// Eight numbers to T, at an address that is a multiple of 16.
__device__ __forceinline__ void store(float* to, const float* x) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
template <typename T>
__device__ __forceinline__ void store(T* to, const float* x) {
  *reinterpret_cast<uint4*>(to) = make_uint4(
      nf4::pair<T>(x[0], x[1]), nf4::pair<T>(x[2], x[3]), nf4::pair<T>(x[4], x[5]),
      nf4::pair<T>(x[6], x[7]));
}

// Columns K .. K + tail of the tile's rows: this weight's strip of b, zeros elsewhere.
template <typename T>
__device__ __forceinline__ void write_tail(const Decode& d, const Place& at) {
  if (d.tail == 0 || blockIdx.x + 1 < gridDim.x) return;
  const int strip = (d.first + at.which) * d.rank;
#pragma unroll 1
  for (int r = threadIdx.x / 32; r < at.left; r += THREADS / 32) {
    T* to = static_cast<T*>(d.out) + (at.to + r) * d.pitch + d.columns;
    const T* b = static_cast<const T*>(d.b) + (at.to + r) * d.b_pitch;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < d.tail; i += 32) {
      const bool ours = d.b != nullptr && i >= strip && i < strip + d.rank;
      to[i] = ours ? b[i - strip] : T{};
    }
  }
}

// How a thread of nf4_dequantize_words comes by its scales.
enum class Mode {
  plain,   // they are stored as float32
  nested,  // it decodes each of its own
  shared,  // K % 64 == 0 and blocks of 64 or more: eight lanes have one scale in every step, and the
           // 32 scales of a warp's eight steps are decoded by a lane each and passed on
};

// A thread has one column of words and goes down it.
template <typename T, Mode mode>
__global__ void __launch_bounds__(THREADS) nf4_dequantize_words(const __grid_constant__ Decode d) {
  const Place at = locate(d);
  if (at.left == 0) return;
  const fastsft_nf4& w = d.weights[at.which];
  const float value = __ldg(w.code + threadIdx.x % 16);
  const unsigned units = static_cast<unsigned>(d.columns) / 8;
  const unsigned shift = d.wide_shift - 3, block_shift = d.block_shift - 3;
  const unsigned begin = blockIdx.x << shift, step = THREADS >> shift;
  // Words are counted from the first word of the tile's first row. Threads beyond the end decode
  // a word that is there, and store nothing.
  const unsigned long long first = at.row * static_cast<unsigned long long>(units);
  const unsigned last = at.left - 1;
  const auto word_of = [&](unsigned thread, unsigned u) {
    const unsigned r = (thread >> shift) + u * step, c = begin + (thread & ((1u << shift) - 1));
    return min(r, last) * units + min(c, units - 1);
  };
  const Scales<mode != Mode::plain> scales(w, first >> block_shift);
  const unsigned within = static_cast<unsigned>(first) & ((1u << block_shift) - 1);
  const auto scale_of = [&](unsigned local) { return scales[(within + local) >> block_shift]; };

  const uint32_t* words = reinterpret_cast<const uint32_t*>(w.packed) + first;
  uint32_t word[STEPS];
  float scale[STEPS];
#pragma unroll
  for (int u = 0; u < STEPS; ++u) {
    const unsigned local = word_of(threadIdx.x, u);
    word[u] = __ldg(words + local);
    if (mode != Mode::shared) scale[u] = scale_of(local);
  }
  if (mode == Mode::shared) {
    const unsigned lane = threadIdx.x % 32;
    const float one = scale_of(word_of(threadIdx.x - lane + lane % 4 * 8, lane / 4));
#pragma unroll
    for (int u = 0; u < STEPS; ++u) scale[u] = __shfl_sync(ALL, one, u * 4 + lane / 8);
  }

  const unsigned r = threadIdx.x >> shift, c = begin + (threadIdx.x & ((1u << shift) - 1));
  T* out = static_cast<T*>(d.out) + (at.to + r) * d.pitch + c * 8;
#pragma unroll
  for (int u = 0; u < STEPS; ++u) {
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      // The earlier of two codes is the higher half of its byte.
      x[j] = nf4::product(__shfl_sync(ALL, value, word[u] >> ((j ^ 1) * 4)), scale[u]);
    }
    if (r + u * step <= last && c < units) store(out, x);
    out += step * d.pitch;
  }
  write_tail<T>(d, at);
}

// One code at a time, where words straddle rows (K % 8 != 0: no known model) or something is not
// aligned.
template <typename T, bool Nested>
__global__ void __launch_bounds__(THREADS) nf4_dequantize_codes(const __grid_constant__ Decode d) {
  const Place at = locate(d);
  const fastsft_nf4& w = d.weights[at.which];
  const int wide = 1 << d.wide_shift;
#pragma unroll 1
  for (int i = threadIdx.x; i < at.left * wide; i += THREADS) {
    const int r = i >> d.wide_shift, c = blockIdx.x * wide + (i & (wide - 1));
    if (c >= d.columns) continue;
    const long long n = (at.row + r) * d.columns + c;
    const int byte = w.packed[n / 2];
    const float value = w.code[n % 2 ? byte & 15 : byte >> 4];
    const float x = nf4::product(value, Scales<Nested>(w, n >> d.block_shift)[0]);
    T* to = static_cast<T*>(d.out) + (at.to + r) * d.pitch + c;
    if constexpr (sizeof(T) == 4) {
      *to = x;
    } else {
      to->raw = static_cast<uint16_t>(nf4::pair<T>(x, 0.0f));
    }
  }
  write_tail<T>(d, at);
}

template <typename T>
void decode(const Decode& d, bool words, bool nested, dim3 grid, void* stream) {
  if (words && !nested) {
    LAUNCH((nf4_dequantize_words<T, Mode::plain>), grid, stream, d);
  } else if (words && (d.columns % 64 != 0 || d.block_shift < 6)) {
    LAUNCH((nf4_dequantize_words<T, Mode::nested>), grid, stream, d);
  } else if (words) {
    LAUNCH((nf4_dequantize_words<T, Mode::shared>), grid, stream, d);
  } else if (nested) {
    LAUNCH((nf4_dequantize_codes<T, true>), grid, stream, d);
  } else {
    LAUNCH((nf4_dequantize_codes<T, false>), grid, stream, d);
  }
}

// Eight numbers from x[i] on; zeros from n on.
template <typename T>
__device__ __forceinline__ void load(float* to, const T* x, long long i, long long n, bool aligned) {
  if (aligned && i + 8 <= n) {
    uint4 raw[sizeof(T) / 2];
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(T) / 2); ++k) {
      raw[k] = __ldg(reinterpret_cast<const uint4*>(x + i) + k);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = nf4::wide(reinterpret_cast<const T*>(raw)[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = i + j < n ? nf4::wide(x[i + j]) : 0.0f;
  }
}

// A warp takes 256 numbers, or one block where that is larger; a lane eight numbers at a time. The
// bounds between codes lie in the lanes as the table of the decode does.
template <typename T>
__global__ void __launch_bounds__(THREADS) nf4_quantize_blocks(
    uint8_t* packed, float* absmax, const T* x, long long n, int block_size, bool aligned,
    const __grid_constant__ nf4::Cells cells) {
  const int lane = threadIdx.x % 32;
  const float own = cells.own[lane];
  const uint32_t earlier = cells.earlier[lane];
  const int unit = block_size > 256 ? block_size : 256;
  const int together = block_size > 256 ? 32 : block_size / 8;  // lanes that share a block
  const long long warps = static_cast<long long>(gridDim.x) * (THREADS / 32);
  const long long warp = static_cast<long long>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  for (long long begin = warp * unit; begin < n; begin += warps * unit) {
    uint32_t largest = 0;
    for (int at = lane * 8; at < unit; at += 256) {
      float v[8];
      load(v, x, begin + at, n, aligned);
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = max(largest, nf4::magnitude(v[j]));
    }
    for (int apart = 1; apart < together; apart *= 2) {
      largest = max(largest, __shfl_xor_sync(ALL, largest, apart));
    }
    const long long block = (begin + lane * 8) / block_size;
    if (lane % together == 0 && block * block_size < n) absmax[block] = nf4::number(largest);
    const float factor = nf4::reciprocal(nf4::number(largest));
    for (int at = lane * 8; at < unit; at += 256) {
      float v[8];
      load(v, x, begin + at, n, aligned);  // again: from the L1 cache
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float scaled = nf4::product(v[j], factor);
        const uint32_t cell = nf4::cell(scaled);
        const uint32_t code =
            __shfl_sync(ALL, earlier, cell) + (scaled > __shfl_sync(ALL, own, cell) ? 1 : 0);
        word |= code << ((j ^ 1) * 4);
      }
      const long long i = begin + at;
      if (i + 8 <= n) {
        *reinterpret_cast<uint32_t*>(packed + i / 2) = word;
      } else {
        for (int k = 0; i + 2 * k < n; ++k) packed[i / 2 + k] = static_cast<uint8_t>(word >> 8 * k);
      }
    }
  }
}

// A warp takes the 256 scales that share an absmax2, a lane eight of them.
__global__ void __launch_bounds__(THREADS) nf4_quantize_scales(
    uint8_t* codes, float* absmax2, const float* absmax, const float* offset, const float* code2,
    long long n) {
  const int lane = threadIdx.x % 32;
  const long long block = static_cast<long long>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  const float mean = *offset;
  float v[8];
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const long long i = block * nf4::NESTED + j * 32 + lane;
    v[j] = i < n ? nf4::sum(absmax[i], -mean) : 0.0f;
    largest = max(largest, nf4::magnitude(v[j]));
  }
  for (int apart = 1; apart < 32; apart *= 2) {
    largest = max(largest, __shfl_xor_sync(ALL, largest, apart));
  }
  if (lane == 0 && block * nf4::NESTED < n) absmax2[block] = nf4::number(largest);
  const float factor = nf4::reciprocal(nf4::number(largest));
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const long long i = block * nf4::NESTED + j * 32 + lane;
    if (i < n) codes[i] = static_cast<uint8_t>(nf4::nearest(nf4::product(v[j], factor), code2));
  }
}

template <typename T>
void encode(
    uint8_t* packed, float* absmax, const void* x, const float* code, long long n, int block_size,
    void* stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const long long unit = block_size > 256 ? block_size : 256;
  const long long blocks = (n + unit * (THREADS / 32) - 1) / (unit * (THREADS / 32));
  const dim3 grid(static_cast<unsigned>(blocks < 16384 ? blocks : 16384));
  LAUNCH(
      nf4_quantize_blocks<T>, grid, stream, packed, absmax, static_cast<const T*>(x), n, block_size,
      aligned, nf4::make_cells(code));
}

int log2_of(long long x) {
  int shift = 0;
  while ((1LL << shift) < x) ++shift;
  return shift;
}

}  // namespace

extern "C" {

int fastsft_abi() { return FASTSFT_ABI; }

const char* fastsft_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// Decodes `count` <= FASTSFT_MOST weights of one K = columns and block size, all with nested scales
// or none, one below the other into out at `pitch` numbers a row; dtype 0 float32, 1 half, 2 bf16.
// Columns K .. K + tail get zeros and, for weight i, b's row in K + (first + i) * rank on.
int fastsft_nf4_dequantize(
    const fastsft_nf4* weights, int count, int first, long long columns, int block_size, void* out,
    long long pitch, int dtype, long long tail, const void* b, long long b_pitch, int rank,
    void* stream) {
  if (count < 1 || count > FASTSFT_MOST || dtype < 0 || dtype > 2) return cudaErrorInvalidValue;
  Decode d = {};
  d.count = count;
  d.first = first;
  d.block_shift = log2_of(block_size);
  d.columns = static_cast<int>(columns);
  d.out = out;
  d.pitch = pitch;
  d.tail = static_cast<int>(tail);
  d.b = b;
  d.b_pitch = b_pitch;
  d.rank = rank;
  const int size = dtype == 0 ? 4 : 2;
  // The widest tile that hangs over a row by 1/16 or less, not narrower than 64.
  d.wide_shift = log2_of(WIDEST);
  while (d.wide_shift > 6 && (-columns & ((1LL << d.wide_shift) - 1)) > columns / 16) --d.wide_shift;
  const long long high = tile_rows(d.wide_shift);
  bool words = columns % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0 && pitch * size % 16 == 0;
  long long tiles = 0;
  for (int i = 0; i < count; ++i) {
    d.weights[i] = weights[i];
    tiles += (weights[i].rows + high - 1) / high;
    words = words && reinterpret_cast<uintptr_t>(weights[i].packed) % 4 == 0;
  }
  if (tiles == 0 || columns == 0) return cudaSuccess;
  const long long across = (columns + (1LL << d.wide_shift) - 1) >> d.wide_shift;
  const long long y = tiles < 65535 ? tiles : 65535, z = (tiles + y - 1) / y;
  if (across > 0x7fffffff || z > 65535) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(y), static_cast<unsigned>(z));
  const bool nested = weights[0].absmax2 != nullptr;
  if (dtype == 0) decode<float>(d, words, nested, grid, stream);
  if (dtype == 1) decode<nf4::Half>(d, words, nested, grid, stream);
  if (dtype == 2) decode<nf4::Bfloat16>(d, words, nested, grid, stream);
  return cudaGetLastError();
}

// x[n] -> packed[(n + 1) / 2] and absmax[ceil(n / block_size)]. code: the 16 values, in host memory.
int fastsft_nf4_quantize(
    uint8_t* packed, float* absmax, const void* x, const float* code, int dtype, long long n,
    int block_size, void* stream) {
  if (n == 0) return cudaSuccess;
  if (dtype == 0) encode<float>(packed, absmax, x, code, n, block_size, stream);
  if (dtype == 1) encode<nf4::Half>(packed, absmax, x, code, n, block_size, stream);
  if (dtype == 2) encode<nf4::Bfloat16>(packed, absmax, x, code, n, block_size, stream);
  return cudaGetLastError();
}

// absmax[n] less *offset -> codes[n] into code2[256], and absmax2[ceil(n / 256)].
int fastsft_nf4_quantize_scales(
    uint8_t* codes, float* absmax2, const float* absmax, const float* offset, const float* code2,
    long long n, void* stream) {
  if (n == 0) return cudaSuccess;
  const long long per_block = nf4::NESTED * (THREADS / 32);
  const dim3 grid(static_cast<unsigned>((n + per_block - 1) / per_block));
  LAUNCH(nf4_quantize_scales, grid, stream, codes, absmax2, absmax, offset, code2, n);
  return cudaGetLastError();
}

}  // extern "C"
