// The operators of kernels.py: Winograd convolution and group norm, each with its gradient. For CPUs with AVX2 they are
// compiled in float32, for CPUs with AVX-512 and its bf16 in float32 and bfloat16.
//
// Images are (B, H, W, C), contiguous, in float32 or bfloat16; all sums are in float32. A thread takes a few tiles or
// channels through all steps before the next ones, so that the numbers between two steps stay in its cache.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using Vectorized = at::vec::Vectorized<float>;
#ifdef CPU_CAPABILITY_AVX512
using Lanes = __m512;
#else
using Lanes = __m256;
#endif

constexpr int64_t LANES = Vectorized::size();
constexpr int64_t CACHED = 128 * 1024;     // numbers in the tiles that a thread works on: 256 KiB in bfloat16
constexpr int64_t GRADIENT_TILES = 512;    // tiles that one matrix product sums over
constexpr int64_t PRODUCT_ROWS = 64;       // rows of such a product that one thread works on
constexpr int64_t MIN_NORM_CHANNELS = 32;  // channels that a thread works on together: a cache line of bfloat16
constexpr int64_t SUMMED = 256;            // numbers added one by one before their sums are added

// ---------------------------------------------------------------------------------------------------- numbers

// How many numbers of a type fill 32 bits. oneDNN's matrix products take the right factor as (K / PAIR, N, PAIR).
template <class T>
constexpr int64_t PAIR = 4 / sizeof(T);

// load and store move the first `count` numbers, at most a vector. store_paired stores PAIR vectors and alternates
// their numbers.

inline Lanes load(const float* p, int64_t count = LANES) { return Vectorized::loadu(p, std::min(count, LANES)); }

inline void store(float* p, Lanes x, int64_t count = LANES) { Vectorized(x).store(p, std::min(count, LANES)); }

inline void store_paired(float* p, const Lanes (&x)[1]) { store(p, x[0]); }

#ifdef CPU_CAPABILITY_AVX512

inline __mmask16 first(int64_t count) { return count >= LANES ? 0xffff : (1 << count) - 1; }

inline Lanes load(const BFloat16* p, int64_t count = LANES) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p)), 16));
}

inline void store(BFloat16* p, Lanes x, int64_t count = LANES) {
  _mm256_mask_storeu_epi16(p, first(count), (__m256i)_mm512_cvtneps_pbh(x));
}

inline void store_paired(BFloat16* p, const Lanes (&x)[2]) {
  const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i by_turns =
      _mm512_add_epi16(_mm512_or_si512(count, _mm512_slli_epi32(count, 16)), _mm512_set1_epi32(16 << 16));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(by_turns, (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0])));
}

#endif

inline Lanes lanes(float x) { return Vectorized(x); }

inline Lanes sigmoid(Lanes x) { return lanes(1) / (lanes(1) + Lanes(Vectorized(-x).exp_u20())); }

inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class F>
auto with_type(at::ScalarType type, F f) {
#ifdef CPU_CAPABILITY_AVX512
  if (type == at::kBFloat16) return f(BFloat16());
  TORCH_CHECK(type == at::kFloat, "speed fused is for float32 and bfloat16, not ", type, "; set another speed");
#else
  TORCH_CHECK(type == at::kFloat, "speed fused is for float32 on this processor, not ", type,
              "; set precision float32, or another speed");
#endif
  return f(float());
}

// ---------------------------------------------------------------------------------------------------- Winograd

// Sides of a tile of outputs and of its inputs: F(4x4, 3x3) in float32. The numbers in its tiles differ so much in size
// that bfloat16 would lose the small ones, so bfloat16 has F(2x2, 3x3).
template <class T>
constexpr int64_t OUT = sizeof(T) == 4 ? 4 : 2;
template <class T>
constexpr int64_t IN = OUT<T> + 2;
template <class T>
constexpr int64_t COMPONENTS = IN<T> * IN<T>;  // numbers of a transformed tile
template <class T>
constexpr int64_t MIN_TILES = sizeof(T) == 4 ? 64 : 8;  // fewer are not worth reading the filters, which no cache holds

// F(4x4, 3x3) interpolates at 0, P, -P, Q, -Q and infinity; errors are 2.3 times smaller than with Lavin & Gray's 1 and
// 2. The filter's value at a point is divided by the product of the differences to the other points.
constexpr float P = 0.625f, Q = 1.5f;
constexpr float AT_0 = 1 / (P * P * Q * Q), AT_P = 1 / (2 * P * P * (P * P - Q * Q));
constexpr float AT_Q = 1 / (2 * Q * Q * (Q * Q - P * P));

// The matrices of both forms (Lavin & Gray 2015, section 4), each applied to one column.
inline void transform_input(const Lanes (&d)[4], Lanes (&out)[4]) {  // B^T
  out[0] = d[0] - d[2], out[1] = d[1] + d[2], out[2] = d[2] - d[1], out[3] = d[1] - d[3];
}

inline void transform_input(const Lanes (&d)[6], Lanes (&out)[6]) {
  const Lanes product = lanes(P * P * Q * Q), sum = lanes(P * P + Q * Q);
  const Lanes even_p = d[4] - lanes(Q * Q) * d[2], odd_p = lanes(P) * (d[3] - lanes(Q * Q) * d[1]);
  const Lanes even_q = d[4] - lanes(P * P) * d[2], odd_q = lanes(Q) * (d[3] - lanes(P * P) * d[1]);
  out[0] = product * d[0] - sum * d[2] + d[4], out[1] = even_p + odd_p, out[2] = even_p - odd_p;
  out[3] = even_q + odd_q, out[4] = even_q - odd_q, out[5] = product * d[1] - sum * d[3] + d[5];
}

inline void transform_filter(const Lanes (&w)[3], Lanes (&out)[4]) {  // G
  const Lanes half = lanes(0.5f), outer = (w[0] + w[2]) * half, middle = w[1] * half;
  out[0] = w[0], out[1] = outer + middle, out[2] = outer - middle, out[3] = w[2];
}

inline void transform_filter(const Lanes (&w)[3], Lanes (&out)[6]) {
  const Lanes even_p = (w[0] + lanes(P * P) * w[2]) * lanes(AT_P), odd_p = w[1] * lanes(P * AT_P);
  const Lanes even_q = (w[0] + lanes(Q * Q) * w[2]) * lanes(AT_Q), odd_q = w[1] * lanes(Q * AT_Q);
  out[0] = w[0] * lanes(AT_0), out[1] = even_p + odd_p, out[2] = even_p - odd_p;
  out[3] = even_q + odd_q, out[4] = even_q - odd_q, out[5] = w[2];
}

inline void transform_output(const Lanes (&m)[4], Lanes (&out)[2]) {  // A^T
  out[0] = m[0] + m[1] + m[2], out[1] = m[1] - m[2] - m[3];
}

inline void transform_output(const Lanes (&m)[6], Lanes (&out)[4]) {
  const Lanes even_p = m[1] + m[2], odd_p = m[1] - m[2], even_q = m[3] + m[4], odd_q = m[3] - m[4];
  out[0] = m[0] + even_p + even_q, out[1] = lanes(P) * odd_p + lanes(Q) * odd_q;
  out[2] = lanes(P * P) * even_p + lanes(Q * Q) * even_q;
  out[3] = lanes(P * P * P) * odd_p + lanes(Q * Q * Q) * odd_q + m[5];
}

inline void transform_output_gradient(const Lanes (&g)[2], Lanes (&out)[4]) {  // A
  out[0] = g[0], out[1] = g[0] + g[1], out[2] = g[0] - g[1], out[3] = -g[1];
}

inline void transform_output_gradient(const Lanes (&g)[4], Lanes (&out)[6]) {
  const Lanes even_p = g[0] + lanes(P * P) * g[2], odd_p = lanes(P) * g[1] + lanes(P * P * P) * g[3];
  const Lanes even_q = g[0] + lanes(Q * Q) * g[2], odd_q = lanes(Q) * g[1] + lanes(Q * Q * Q) * g[3];
  out[0] = g[0], out[1] = even_p + odd_p, out[2] = even_p - odd_p;
  out[3] = even_q + odd_q, out[4] = even_q - odd_q, out[5] = g[3];
}

inline void transform_filter_gradient(const Lanes (&p)[4], Lanes (&out)[3]) {  // G^T
  const Lanes half = lanes(0.5f), sum = (p[1] + p[2]) * half;
  out[0] = p[0] + sum, out[1] = (p[1] - p[2]) * half, out[2] = sum + p[3];
}

inline void transform_filter_gradient(const Lanes (&p)[6], Lanes (&out)[3]) {
  const Lanes even_p = (p[1] + p[2]) * lanes(AT_P), even_q = (p[3] + p[4]) * lanes(AT_Q);
  out[0] = lanes(AT_0) * p[0] + even_p + even_q;
  out[1] = lanes(P * AT_P) * (p[1] - p[2]) + lanes(Q * AT_Q) * (p[3] - p[4]);
  out[2] = lanes(P * P) * even_p + lanes(Q * Q) * even_q + p[5];
}

// Computes transform x transform^T for a tile whose numbers lie in rows.
template <int64_t N, int64_t M>
inline void both_ways(void (&transform)(const Lanes (&)[N], Lanes (&)[M]), const Lanes (&in)[N * N],
                      Lanes (&out)[M * M]) {
  Lanes rows[M][N];
#pragma GCC unroll 6
  for (int column = 0; column < N; ++column) {
    Lanes from[N], to[M];
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) from[i] = in[i * N + column];
    transform(from, to);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) rows[i][column] = to[i];
  }
#pragma GCC unroll 6
  for (int row = 0; row < M; ++row) {
    Lanes to[M];
    transform(rows[row], to);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) out[row * M + i] = to[i];
  }
}

// The size of images.
struct Images {
  int64_t count, height, width;
};

// The tiles of OUT x OUT pixels into which the output of a convolution is cut. A tile is computed from IN x IN input
// pixels, the first of which lies `padding` pixels above and to the left of the tile.
template <class T>
struct Tiling {
  int64_t rows, columns, count;

  explicit Tiling(const Images& output)
      : rows(blocks(output.height, OUT<T>)),
        columns(blocks(output.width, OUT<T>)),
        count(output.count * rows * columns) {}

  // Addresses of SIZE x SIZE pixels, the first of which lies `padding` pixels above and to the left of tile number
  // `tile`; `outside` stands for pixels that are not in the image, and for tiles beyond the last.
  template <int64_t SIZE, class U>
  void pixels(int64_t tile, const Images& images, U* image, int64_t channels, int64_t padding, U* outside,
              U* (&found)[SIZE * SIZE]) const {
    const int64_t top = tile / columns % rows * OUT<T> - padding, left = tile % columns * OUT<T> - padding;
    U* const start = tile < count ? image + tile / (rows * columns) * images.height * images.width * channels : nullptr;
    for (int64_t y = 0; y < SIZE; ++y)
      for (int64_t x = 0; x < SIZE; ++x) {
        const bool inside =
            start && top + y >= 0 && top + y < images.height && left + x >= 0 && left + x < images.width;
        found[y * SIZE + x] = inside ? start + ((top + y) * images.width + left + x) * channels : outside;
      }
  }
};

template <int64_t PIXELS, class T>
inline void load_tile(T* const (&pixels)[PIXELS], int64_t channel, Lanes (&tile)[PIXELS]) {
#pragma GCC unroll 36
  for (int64_t i = 0; i < PIXELS; ++i) tile[i] = load(pixels[i] + channel);
}

// The distance in memory from one component to the next: its size and a cache line more, because caches put addresses
// that differ by a multiple of a high power of 2 into the same few places.
template <class T>
int64_t padded(int64_t numbers) {
  return numbers + 64 / sizeof(T);
}

// Filters (K, 3, 3, C) float32 -> right factors (COMPONENTS, C, K), or (COMPONENTS, K, C) if turned by 180 degrees.
template <class T>
Tensor filter_tiles(const Tensor& weight, bool turned) {
  const int64_t num_out = weight.size(0), num_in = weight.size(3), size = num_out * num_in;
  const float* const w = weight.const_data_ptr<float>();
  Tensor result = at::empty({COMPONENTS<T>, turned ? num_out : num_in, turned ? num_in : num_out},
                            weight.options().dtype(c10::CppTypeToScalarType<T>::value));
  T* const out = result.mutable_data_ptr<T>();
  at::parallel_for(0, num_out / LANES, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float found[COMPONENTS<T>][LANES][LANES], across[LANES][LANES];  // components of LANES^2 filters
    for (int64_t k = begin * LANES; k < end * LANES; k += LANES)
      for (int64_t c = 0; c < num_in; c += LANES) {
        for (int64_t i = 0; i < LANES; ++i) {
          Lanes filter[9], tile[COMPONENTS<T>];
          for (int64_t j = 0; j < 9; ++j) filter[j] = load(w + ((k + i) * 9 + (turned ? 8 - j : j)) * num_in + c);
          both_ways<3, IN<T>>(transform_filter, filter, tile);
          for (int64_t j = 0; j < COMPONENTS<T>; ++j) store(found[j][i], tile[j]);
        }
        for (int64_t j = 0; j < COMPONENTS<T>; ++j) {
          const float (*rows)[LANES] = found[j];
          if (!turned) {
            at::vec::transpose_mxn<float, LANES, LANES>(found[j][0], LANES, across[0], LANES);
            rows = across;
          }
          const int64_t row = turned ? k : c, column = turned ? c : k, length = turned ? num_in : num_out;
          for (int64_t i = 0; i < LANES; i += PAIR<T>) {
            Lanes pair[PAIR<T>];
            for (int64_t one = 0; one < PAIR<T>; ++one) pair[one] = load(rows[i + one]);
            store_paired(out + j * size + (row + i) * length + column * PAIR<T>, pair);
          }
        }
      }
  });
  return result;
}

template <class T>
void release_products() {
  if (PAIR<T> == 2) at::native::cpublas::brgemm_release();  // the matrix unit, where there is one
}

Images images_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2)}; }

// (B, H, W, C) * (COMPONENTS, C, K) + (K,) -> (B, H + 2 padding - 2, W + 2 padding - 2, K)
template <class T>
Tensor convolve(const Tensor& x, const Tensor& filters, const Tensor& bias, int64_t padding) {
  const int64_t num_in = x.size(3), num_out = filters.size(2);
  const Images from = images_of(x), to{from.count, from.height + 2 * padding - 2, from.width + 2 * padding - 2};
  const Tiling<T> tiling(to);
  Tensor result = at::empty({to.count, to.height, to.width, num_out}, x.options());
  const T* const image = x.const_data_ptr<T>();
  const T* const filter = filters.const_data_ptr<T>();
  const float* const added = bias.const_data_ptr<float>();
  T* const out = result.mutable_data_ptr<T>();

  const int64_t share = blocks(tiling.count, at::get_num_threads());
  const int64_t all = std::max<int64_t>(share, 8);
  const int64_t together = std::clamp<int64_t>(CACHED / COMPONENTS<T> / num_in, std::min(MIN_TILES<T>, all), all);
  const int64_t width = std::min(num_out, std::max<int64_t>(CACHED / 2 / COMPONENTS<T> / together / 64 * 64, 64));
  const int64_t tiles_step = padded<T>(together * num_in), products_step = padded<float>(together * width);
  at::parallel_for(0, blocks(tiling.count, together), 1, [&](int64_t begin, int64_t end) {
    const std::vector<T> zeros(num_in);
    std::vector<T> dump(num_out);  // for pixels below and to the right of images with odd sides
    const Tensor scratch = at::empty({COMPONENTS<T> * tiles_step}, x.options());
    const Tensor sums = at::empty({COMPONENTS<T> * products_step}, bias.options());
    T* const tiles = scratch.mutable_data_ptr<T>();
    float* const products = sums.mutable_data_ptr<float>();
    for (int64_t start = begin * together; start < end * together; start += together) {
      for (int64_t t = 0; t < together; ++t) {
        const T* pixels[COMPONENTS<T>];
        tiling.template pixels<IN<T>>(start + t, from, image, num_in, padding, zeros.data(), pixels);
        for (int64_t c = 0; c < num_in; c += LANES) {
          Lanes d[COMPONENTS<T>], tile[COMPONENTS<T>];
          load_tile(pixels, c, d);
          both_ways<IN<T>, IN<T>>(transform_input, d, tile);
#pragma GCC unroll 36
          for (int64_t i = 0; i < COMPONENTS<T>; ++i) store(tiles + i * tiles_step + t * num_in + c, tile[i]);
        }
      }
      for (int64_t k0 = 0; k0 < num_out; k0 += width) {
        const int64_t num_columns = std::min(width, num_out - k0);
        for (int64_t i = 0; i < COMPONENTS<T>; ++i)
          at::native::cpublas::brgemm(together, num_columns, num_in, num_in, num_out, width, false,
                                      tiles + i * tiles_step, filter + i * num_in * num_out + k0 * PAIR<T>,
                                      products + i * products_step, PAIR<T> == 2);
        for (int64_t t = 0; t < together && start + t < tiling.count; ++t) {
          T* pixels[OUT<T> * OUT<T>];
          tiling.template pixels<OUT<T>>(start + t, to, out, num_out, 0, dump.data(), pixels);
          for (int64_t k = 0; k < num_columns; k += LANES) {
            Lanes m[COMPONENTS<T>], tile[OUT<T> * OUT<T>];
#pragma GCC unroll 36
            for (int64_t i = 0; i < COMPONENTS<T>; ++i) m[i] = load(products + i * products_step + t * width + k);
            both_ways<IN<T>, OUT<T>>(transform_output, m, tile);
            for (int64_t i = 0; i < OUT<T> * OUT<T>; ++i) store(pixels[i] + k0 + k, tile[i] + load(added + k0 + k));
          }
        }
      }
    }
    release_products<T>();
  });
  return result;
}

// Images (B, H, W, C) and the gradient of the output (B, H, W, K) -> gradients of weight, (K, 3, 3, C), and bias, (K,).
template <class T>
std::tuple<Tensor, Tensor> filter_gradient(const Tensor& x, const Tensor& grad, int64_t padding) {
  constexpr int64_t GROUP = LANES * PAIR<T>;  // tiles; one channel of one of their components fills a vector
  const int64_t num_in = x.size(3), num_out = grad.size(3), size = num_in * num_out;
  const Images from = images_of(x), to = images_of(grad);
  const Tiling<T> tiling(to);
  const T* const image = x.const_data_ptr<T>();
  const T* const slope = grad.const_data_ptr<T>();
  const auto floats = x.options().dtype(at::kFloat);

  // Each component is a product: gradients (K, tiles) times inputs (tiles, C).
  if (tiling.count == 0) return {at::zeros({num_out, 3, 3, num_in}, floats), at::zeros({num_out}, floats)};
  const int64_t turns = blocks(tiling.count, std::max(GRADIENT_TILES, GROUP * at::get_num_threads()));
  const int64_t together = blocks(blocks(tiling.count, turns), GROUP) * GROUP;
  const int64_t left_length = padded<T>(together);
  const int64_t left_step = num_out * left_length, right_step = padded<T>(together * num_in);
  const Tensor left_scratch = at::empty({COMPONENTS<T> * left_step}, x.options());
  const Tensor right_scratch = at::empty({COMPONENTS<T> * right_step}, x.options());
  const Tensor sums = at::empty({COMPONENTS<T>, num_out, num_in}, floats);
  const Tensor bias_scratch = at::empty({blocks(tiling.count, GROUP), num_out}, floats);  // a row for each group
  T* const left = left_scratch.mutable_data_ptr<T>();
  T* const right = right_scratch.mutable_data_ptr<T>();
  float* const products = sums.mutable_data_ptr<float>();
  float* const bias_parts = bias_scratch.mutable_data_ptr<float>();
  const std::vector<T> zeros(std::max(num_in, num_out));
  for (int64_t start = 0; start < tiling.count; start += together) {
    at::parallel_for(0, together / GROUP, 1, [&](int64_t begin, int64_t end) {
      alignas(64) T found[COMPONENTS<T>][LANES][LANES * PAIR<T>];  // pairs of tiles by channels
      for (int64_t group = begin * GROUP; group < end * GROUP; group += GROUP) {
        const T* pixels[GROUP][OUT<T> * OUT<T>];
        for (int64_t t = 0; t < GROUP; ++t)
          tiling.template pixels<OUT<T>>(start + group + t, to, slope, num_out, 0, zeros.data(), pixels[t]);
        for (int64_t k = 0; k < num_out; k += LANES) {
          Lanes total = lanes(0);
          for (int64_t t = 0; t < GROUP; t += PAIR<T>) {
            Lanes tiles[COMPONENTS<T>][PAIR<T>];
            for (int64_t one = 0; one < PAIR<T>; ++one) {
              Lanes g[OUT<T> * OUT<T>], tile[COMPONENTS<T>];
              load_tile(pixels[t + one], k, g);
              both_ways<OUT<T>, IN<T>>(transform_output_gradient, g, tile);
              Lanes sum = g[0];
              for (int64_t i = 1; i < OUT<T> * OUT<T>; ++i) sum += g[i];
              total += sum;
              for (int64_t i = 0; i < COMPONENTS<T>; ++i) tiles[i][one] = tile[i];
            }
            for (int64_t i = 0; i < COMPONENTS<T>; ++i) store_paired(found[i][t / PAIR<T>], tiles[i]);
          }
          if (start + group < tiling.count) store(bias_parts + (start + group) / GROUP * num_out + k, total);
          for (int64_t i = 0; i < COMPONENTS<T>; ++i)  // numbers are only moved, so their meaning does not matter
            at::vec::transpose_mxn<float, LANES, LANES>(
                reinterpret_cast<float*>(found[i][0]), LANES,
                reinterpret_cast<float*>(left + i * left_step + k * left_length + group), left_length / PAIR<T>);
        }
        for (int64_t t = 0; t < GROUP; t += PAIR<T>) {
          const T* sources[PAIR<T>][COMPONENTS<T>];
          for (int64_t one = 0; one < PAIR<T>; ++one)
            tiling.template pixels<IN<T>>(start + group + t + one, from, image, num_in, padding, zeros.data(),
                                          sources[one]);
          for (int64_t c = 0; c < num_in; c += LANES) {
            Lanes tiles[COMPONENTS<T>][PAIR<T>];
            for (int64_t one = 0; one < PAIR<T>; ++one) {
              Lanes d[COMPONENTS<T>], tile[COMPONENTS<T>];
              load_tile(sources[one], c, d);
              both_ways<IN<T>, IN<T>>(transform_input, d, tile);
              for (int64_t i = 0; i < COMPONENTS<T>; ++i) tiles[i][one] = tile[i];
            }
            for (int64_t i = 0; i < COMPONENTS<T>; ++i)
              store_paired(right + i * right_step + (group + t) * num_in + c * PAIR<T>, tiles[i]);
          }
        }
      }
    });
    const int64_t parts = blocks(num_out, PRODUCT_ROWS);  // gives work to more threads than there are components
    at::parallel_for(0, COMPONENTS<T> * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t i = part / parts, k = part % parts * PRODUCT_ROWS;
        at::native::cpublas::brgemm(std::min(PRODUCT_ROWS, num_out - k), num_in, together, left_length, num_in, num_in,
                                    start > 0, left + i * left_step + k * left_length, right + i * right_step,
                                    products + i * size + k * num_in, PAIR<T> == 2);
      }
      release_products<T>();
    });
  }

  Tensor result = at::empty({num_out, 3, 3, num_in}, floats);
  float* const out = result.mutable_data_ptr<float>();
  at::parallel_for(0, num_out, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t c = 0; c < num_in; c += LANES) {
        Lanes tile[COMPONENTS<T>], filter[9];
        for (int64_t i = 0; i < COMPONENTS<T>; ++i) tile[i] = load(products + i * size + k * num_in + c);
        both_ways<IN<T>, 3>(transform_filter_gradient, tile, filter);
        for (int64_t i = 0; i < 9; ++i) store(out + (k * 9 + i) * num_in + c, filter[i]);
      }
  });
  return {result, bias_scratch.sum(0)};
}

// ---------------------------------------------------------------------------------------------------- group norm

struct Sums {
  Lanes one = lanes(0), two = lanes(0);
};

// The sums of the numbers that add(i, sums) adds for i < count; parts are summed first, so that few digits are lost.
template <class F>
Sums summed(int64_t count, F add) {
  Sums total;
  for (int64_t begin = 0; begin < count; begin += SUMMED) {
    Sums part;
    for (int64_t i = begin; i < std::min(begin + SUMMED, count); ++i) add(i, part);
    total.one += part.one, total.two += part.two;
  }
  return total;
}

// Calls f(image, start, count) in all threads for the channels of each image: whole groups, at least a cache line.
template <class F>
void for_channels(int64_t num_images, int64_t num_channels, int64_t num_groups, F f) {
  const int64_t size = blocks(MIN_NORM_CHANNELS, num_channels / num_groups) * (num_channels / num_groups);
  const int64_t parts = blocks(num_channels, size);
  at::parallel_for(0, num_images * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t start = part % parts * size;
      f(part / parts, start, std::min(size, num_channels - start));
    }
  });
}

// Images x (B, H, W, C) and gain, shift and offset of each channel, (B, C) float32 -> normalised x + offset, and mean
// and inverse standard deviation of each group, (B, G) float32.
template <class T>
std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& x, const Tensor& gain, const Tensor& shift,
                                              const Tensor& offset, int64_t num_groups, double eps, bool silu) {
  const int64_t num_pixels = x.size(1) * x.size(2), num_channels = x.size(3), group_size = num_channels / num_groups;
  const Tensor result = at::empty_like(x);
  const Tensor means = at::empty({x.size(0), num_groups}, gain.options()), inverses = at::empty_like(means);
  const auto* image = x.const_data_ptr<T>();
  const auto *gains = gain.const_data_ptr<float>(), *shifts = shift.const_data_ptr<float>();
  const auto* offsets = offset.const_data_ptr<float>();
  auto* out = result.mutable_data_ptr<T>();
  auto *group_mean = means.mutable_data_ptr<float>(), *group_inverse = inverses.mutable_data_ptr<float>();
  for_channels(x.size(0), num_channels, num_groups, [&](int64_t b, int64_t start, int64_t count) {
    const int64_t size = blocks(count, LANES) * LANES, channel = b * num_channels + start;
    const T* const from = image + b * num_pixels * num_channels + start;
    T* const to = out + b * num_pixels * num_channels + start;
    std::vector<float> mean(size), variance(size), centre(size), scale(size);  // a number for each channel
    for (int64_t c = 0; c < count; c += LANES) {
      // Moments are taken about each channel's first pixel: about 0, a large mean would drown the variance.
      const int64_t rest = count - c;
      const Lanes origin = load(from + c, rest);
      const Sums sums = summed(num_pixels, [&](int64_t p, Sums& part) {
        const Lanes distance = load(from + p * num_channels + c, rest) - origin;
        part.one += distance, part.two += distance * distance;
      });
      const Lanes average = sums.one / lanes(num_pixels);
      store(&mean[c], origin + average + load(offsets + channel + c, rest));
      store(&variance[c], sums.two / lanes(num_pixels) - average * average);
    }
    for (int64_t c0 = 0; c0 < count; c0 += group_size) {
      float of_mean = 0, of_variance = 0;
      for (int64_t c = c0; c < c0 + group_size; ++c) of_mean += mean[c] / group_size;
      for (int64_t c = c0; c < c0 + group_size; ++c)
        of_variance += (variance[c] + (mean[c] - of_mean) * (mean[c] - of_mean)) / group_size;
      const float inverse = 1 / std::sqrt(std::max(of_variance, 0.0f) + static_cast<float>(eps));
      group_mean[(channel + c0) / group_size] = of_mean;
      group_inverse[(channel + c0) / group_size] = inverse;
      for (int64_t c = c0; c < c0 + group_size; ++c) {
        centre[c] = of_mean - offsets[channel + c];
        scale[c] = gains[channel + c] * inverse;
      }
    }
    for (int64_t c = 0; c < count; c += LANES) {
      const int64_t rest = count - c;
      const Lanes middle = load(&centre[c]), by = load(&scale[c]), and_added = load(shifts + channel + c, rest);
      for (int64_t p = 0; p < num_pixels; ++p) {
        const Lanes z = (load(from + p * num_channels + c, rest) - middle) * by + and_added;
        store(to + p * num_channels + c, silu ? z * sigmoid(z) : z, rest);
      }
    }
  });
  return {result, means, inverses};
}

// The gradients of x, (B, H, W, C), and of gain, shift and offset of each channel, (B, C).
template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_gradient(const Tensor& grad, const Tensor& x, const Tensor& gain,
                                                               const Tensor& shift, const Tensor& offset,
                                                               const Tensor& means, const Tensor& inverses, bool silu) {
  const int64_t num_pixels = x.size(1) * x.size(2), num_channels = x.size(3), num_groups = means.size(1);
  const int64_t group_size = num_channels / num_groups;
  const Tensor grad_x = at::empty_like(x), grad_gain = at::empty_like(gain), grad_shift = at::empty_like(gain);
  const Tensor grad_offset = at::empty_like(gain);
  const auto *image = x.const_data_ptr<T>(), *slopes = grad.const_data_ptr<T>();
  const auto *gains = gain.const_data_ptr<float>(), *shifts = shift.const_data_ptr<float>();
  const auto *offsets = offset.const_data_ptr<float>(), *group_mean = means.const_data_ptr<float>();
  const auto* group_inverse = inverses.const_data_ptr<float>();
  auto* out = grad_x.mutable_data_ptr<T>();
  auto *out_gain = grad_gain.mutable_data_ptr<float>(), *out_shift = grad_shift.mutable_data_ptr<float>();
  auto* out_offset = grad_offset.mutable_data_ptr<float>();
  for_channels(x.size(0), num_channels, num_groups, [&](int64_t b, int64_t start, int64_t count) {
    const int64_t size = blocks(count, LANES) * LANES, channel = b * num_channels + start;
    const int64_t begin = b * num_pixels * num_channels + start;
    const T *const from = image + begin, *const slope = slopes + begin;
    T* const to = out + begin;
    std::vector<float> centre(size), scale(size), sum(size), sum_x(size), by_x(size), added(size);
    const std::unique_ptr<float[]> kept(new float[silu ? size * num_pixels : 0]);  // dz, where z is the input of SiLU
    for (int64_t c = 0; c < count; ++c) {
      const int64_t group = (channel + c) / group_size;
      centre[c] = group_mean[group] - offsets[channel + c];
      scale[c] = gains[channel + c] * group_inverse[group];
    }
    for (int64_t c = 0; c < count; c += LANES) {
      const int64_t rest = count - c;
      const Lanes middle = load(&centre[c]), by = load(&scale[c]), and_added = load(shifts + channel + c, rest);
      const Sums sums = summed(num_pixels, [&](int64_t p, Sums& part) {
        const Lanes distance = load(from + p * num_channels + c, rest) - middle;
        Lanes dz = load(slope + p * num_channels + c, rest);
        if (silu) {
          const Lanes z = distance * by + and_added, gate = sigmoid(z);
          dz *= gate * (lanes(1) + z * (lanes(1) - gate));
          store(&kept[c * num_pixels + p * LANES], dz);
        }
        part.one += dz, part.two += dz * distance;
      });
      store(&sum[c], sums.one), store(&sum_x[c], sums.two);
    }
    for (int64_t c0 = 0; c0 < count; c0 += group_size) {
      // With h the normalised x, dx = (dh - mean(dh) - h mean(dh h)) / deviation over each group.
      const float inverse = group_inverse[(channel + c0) / group_size];
      float mean = 0, mean_x = 0;
      for (int64_t c = c0; c < c0 + group_size; ++c) {
        out_shift[channel + c] = sum[c];
        out_gain[channel + c] = sum_x[c] * inverse;
        mean += sum[c] * gains[channel + c] / (group_size * num_pixels);
        mean_x += out_gain[channel + c] * gains[channel + c] / (group_size * num_pixels);
      }
      for (int64_t c = c0; c < c0 + group_size; ++c) {
        by_x[c] = -mean_x * inverse * inverse;
        added[c] = -mean * inverse;
      }
    }
    for (int64_t c = 0; c < count; c += LANES) {
      const int64_t rest = count - c;
      const Lanes middle = load(&centre[c]), by = load(&scale[c]), by_distance = load(&by_x[c]);
      const Lanes and_added = load(&added[c]);
      const Sums sums = summed(num_pixels, [&](int64_t p, Sums& part) {
        const int64_t place = p * num_channels + c;
        const Lanes dz = silu ? load(&kept[c * num_pixels + p * LANES]) : load(slope + place, rest);
        const Lanes dx = dz * by + (load(from + place, rest) - middle) * by_distance + and_added;
        part.one += dx;
        store(to + place, dx, rest);
      });
      store(out_offset + channel + c, sums.one, rest);
    }
  });
  return {grad_x, grad_gain, grad_shift, grad_offset};
}

// ---------------------------------------------------------------------------------------------------- operators

void check(const Tensor& x, at::ScalarType type, at::IntArrayRef shape) {
  TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == type && x.sizes() == shape, "expected ", shape, " ",
              type, " on the CPU, contiguous, got ", x.sizes(), " ", x.scalar_type(), " on ", x.device());
}

void check_image(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4, "expected (B, H, W, C), got ", x.sizes());
  check(x, x.scalar_type(), x.sizes());
}

void check_channels(int64_t count) {
  TORCH_CHECK(count > 0 && count % LANES == 0, "channels must be a multiple of ", LANES, ", got ", count);
}

void check_padding(const Tensor& x, int64_t padding) {
  TORCH_CHECK(padding >= 0 && padding <= 2, "padding must be 0 to 2, got ", padding);
  TORCH_CHECK(x.size(1) + 2 * padding > 2 && x.size(2) + 2 * padding > 2, "images must be at least ", 3 - 2 * padding,
              " pixels high and wide, got ", x.size(1), " x ", x.size(2));
}

}  // namespace

TORCH_LIBRARY(unet_diffusion, library) {
  library.def("winograd_filters", [](const Tensor& weight, at::ScalarType type, bool turned) {
    TORCH_CHECK(weight.dim() == 4, "expected (K, 3, 3, C), got ", weight.sizes());
    check(weight, at::kFloat, {weight.size(0), 3, 3, weight.size(3)});
    check_channels(weight.size(0)), check_channels(weight.size(3));
    return with_type(type, [&](auto number) { return filter_tiles<decltype(number)>(weight, turned); });
  });
  library.def("winograd_convolve", [](const Tensor& x, const Tensor& filters, const Tensor& bias, int64_t padding) {
    check_image(x), check_channels(x.size(3)), check_channels(bias.numel());
    check_padding(x, padding);
    check(bias, at::kFloat, {bias.numel()});
    return with_type(x.scalar_type(), [&](auto number) {
      check(filters, x.scalar_type(), {COMPONENTS<decltype(number)>, x.size(3), bias.numel()});
      return convolve<decltype(number)>(x, filters, bias, padding);
    });
  });
  library.def("winograd_filter_gradient", [](const Tensor& x, const Tensor& grad, int64_t padding) {
    check_image(x), check_image(grad), check_channels(x.size(3)), check_channels(grad.size(3));
    check_padding(x, padding);
    const int64_t more = 2 * padding - 2;
    check(grad, x.scalar_type(), {x.size(0), x.size(1) + more, x.size(2) + more, grad.size(3)});
    return with_type(x.scalar_type(), [&](auto number) { return filter_gradient<decltype(number)>(x, grad, padding); });
  });
  library.def("group_norm", [](const Tensor& x, const Tensor& gain, const Tensor& shift, const Tensor& offset,
                               int64_t num_groups, double eps, bool silu) {
    check_image(x);
    TORCH_CHECK(num_groups > 0 && x.size(3) % num_groups == 0, x.size(3), " channels in ", num_groups, " groups");
    TORCH_CHECK(x.numel() > 0 || x.size(0) == 0, "images must have pixels and channels, got ", x.sizes());
    for (const Tensor& one : {gain, shift, offset}) check(one, at::kFloat, {x.size(0), x.size(3)});
    return with_type(x.scalar_type(), [&](auto number) {
      return group_norm<decltype(number)>(x, gain, shift, offset, num_groups, eps, silu);
    });
  });
  library.def("group_norm_gradient", [](const Tensor& grad, const Tensor& x, const Tensor& gain, const Tensor& shift,
                                        const Tensor& offset, const Tensor& means, const Tensor& inverses, bool silu) {
    check_image(x), check(grad, x.scalar_type(), x.sizes());
    for (const Tensor& one : {gain, shift, offset}) check(one, at::kFloat, {x.size(0), x.size(3)});
    for (const Tensor& one : {means, inverses}) check(one, at::kFloat, {x.size(0), means.size(1)});
    return with_type(x.scalar_type(), [&](auto number) {
      return group_norm_gradient<decltype(number)>(grad, x, gain, shift, offset, means, inverses, silu);
    });
  });
}
