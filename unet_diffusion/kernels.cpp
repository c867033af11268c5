// The operators of kernels.py for CPUs with AVX-512 and its bf16: Winograd convolution and group norm, each with its
// gradient.
//
// Images are (B, H, W, C), contiguous, in float32 or bfloat16; all sums are in float32. A thread takes a few tiles or
// channels at a time through all that is done to them, so that what lies between stays in its cache.

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
using Lanes = __m512;  // 16 numbers

constexpr int64_t LANES = 16;
constexpr int64_t COMPONENTS = 16;         // of a 4x4 tile
constexpr int64_t CACHED = 128 * 1024;     // numbers of tiles a thread works on: 256 KiB in bfloat16
constexpr int64_t GRADIENT_TILES = 512;    // summed over by one matrix product
constexpr int64_t PRODUCT_ROWS = 64;       // of such a product that one thread works on
constexpr int64_t MIN_NORM_CHANNELS = 32;  // worked on together: a cache line of bfloat16
constexpr int64_t SUMMED = 256;            // numbers added one by one; their sums are added after that

// ---------------------------------------------------------------------------------------------------- numbers

// Numbers of one type that fill 32 bits. oneDNN's matrix products want the right factor as (K / PAIR, N, PAIR).
template <class T>
constexpr int64_t PAIR = 4 / sizeof(T);

inline Lanes load(const float* p, __mmask16 mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, p); }

inline Lanes load(const BFloat16* p, __mmask16 mask = 0xffff) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

inline void store(float* p, Lanes x, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(p, mask, x); }

inline void store(BFloat16* p, Lanes x, __mmask16 mask = 0xffff) {
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// As many vectors as PAIR of that type, their numbers by turns.
inline __m512i paired(const float*, const Lanes* x) { return _mm512_castps_si512(x[0]); }

inline __m512i paired(const BFloat16*, const Lanes* x) {
  const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i by_turns =
      _mm512_add_epi16(_mm512_or_si512(count, _mm512_slli_epi32(count, 16)), _mm512_set1_epi32(16 << 16));
  return _mm512_permutexvar_epi16(by_turns, (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
}

inline Lanes lanes(float x) { return _mm512_set1_ps(x); }

inline Lanes sigmoid(Lanes x) { return lanes(1) / (lanes(1) + Lanes(at::vec::Vectorized<float>(-x).exp_u20())); }

inline __mmask16 first(int64_t count) { return count >= LANES ? 0xffff : (1 << count) - 1; }

inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class F>
auto with_type(at::ScalarType type, F f) {
  if (type == at::kFloat) return f(float());
  TORCH_CHECK(type == at::kBFloat16, "speed fused is for float32 and bfloat16, not ", type, "; set another speed");
  return f(BFloat16());
}

// ---------------------------------------------------------------------------------------------------- Winograd

// The matrices of F(2x2, 3x3), section 4.1 of Lavin & Gray 2015, each applied to one column.
inline void transform_input(const Lanes (&d)[4], Lanes (&out)[4]) {  // B^T
  out[0] = d[0] - d[2], out[1] = d[1] + d[2], out[2] = d[2] - d[1], out[3] = d[1] - d[3];
}

inline void transform_filter(const Lanes (&w)[3], Lanes (&out)[4]) {  // G
  const Lanes half = lanes(0.5f), outer = (w[0] + w[2]) * half, middle = w[1] * half;
  out[0] = w[0], out[1] = outer + middle, out[2] = outer - middle, out[3] = w[2];
}

inline void transform_output(const Lanes (&m)[4], Lanes (&out)[2]) {  // A^T
  out[0] = m[0] + m[1] + m[2], out[1] = m[1] - m[2] - m[3];
}

inline void transform_output_gradient(const Lanes (&g)[2], Lanes (&out)[4]) {  // A
  out[0] = g[0], out[1] = g[0] + g[1], out[2] = g[0] - g[1], out[3] = -g[1];
}

inline void transform_filter_gradient(const Lanes (&p)[4], Lanes (&out)[3]) {  // G^T
  const Lanes half = lanes(0.5f), sum = (p[1] + p[2]) * half;
  out[0] = p[0] + sum, out[1] = (p[1] - p[2]) * half, out[2] = sum + p[3];
}

// transform x transform^T, for a tile whose numbers lie in rows.
template <int N, int M>
inline void both_ways(void (&transform)(const Lanes (&)[N], Lanes (&)[M]), const Lanes (&in)[N * N],
                      Lanes (&out)[M * M]) {
  Lanes rows[M][N];
#pragma GCC unroll 4
  for (int column = 0; column < N; ++column) {
    Lanes from[N], to[M];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) from[i] = in[i * N + column];
    transform(from, to);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) rows[i][column] = to[i];
  }
#pragma GCC unroll 4
  for (int row = 0; row < M; ++row) {
    Lanes to[M];
    transform(rows[row], to);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) out[row * M + i] = to[i];
  }
}

// Images of one size.
struct Images {
  int64_t count, height, width;
};

// How the output of a convolution is cut into tiles of 2x2 pixels. Each is made of the 4x4 input pixels from `padding`
// above and to the left of its place.
struct Tiling {
  int64_t rows, columns, count;

  explicit Tiling(const Images& output)
      : rows(blocks(output.height, 2)), columns(blocks(output.width, 2)), count(output.count * rows * columns) {}

  // Addresses of the SIZE x SIZE pixels from `padding` above and to the left of the place of tile number `tile`;
  // `outside` for those that are not in the image, and for tiles beyond the last.
  template <int SIZE, class T>
  void pixels(int64_t tile, const Images& images, T* image, int64_t channels, int64_t padding, T* outside,
              T* (&found)[SIZE * SIZE]) const {
    const int64_t top = tile / columns % rows * 2 - padding, left = tile % columns * 2 - padding;
    T* const start = tile < count ? image + tile / (rows * columns) * images.height * images.width * channels : nullptr;
    for (int64_t y = 0; y < SIZE; ++y)
      for (int64_t x = 0; x < SIZE; ++x) {
        const bool inside =
            start && top + y >= 0 && top + y < images.height && left + x >= 0 && left + x < images.width;
        found[y * SIZE + x] = inside ? start + ((top + y) * images.width + left + x) * channels : outside;
      }
  }
};

template <int SIZE, class T>
inline void load_tile(T* const (&pixels)[SIZE * SIZE], int64_t channel, Lanes (&tile)[SIZE * SIZE]) {
#pragma GCC unroll 16
  for (int i = 0; i < SIZE * SIZE; ++i) tile[i] = load(pixels[i] + channel);
}

// Distance between components of as many numbers: a cache line more, as caches put multiples of a high power of 2 in
// the same few places.
template <class T>
int64_t padded(int64_t numbers) {
  return numbers + 64 / sizeof(T);
}

// (K, 3, 3, C) float32 -> (16, C, K), or (16, K, C) of filters turned by 180 degrees, as right factors of products.
template <class T>
Tensor filter_tiles(const Tensor& weight, bool turned) {
  const int64_t num_out = weight.size(0), num_in = weight.size(3), size = num_out * num_in;
  const float* const w = weight.const_data_ptr<float>();
  Tensor result = at::empty({COMPONENTS, turned ? num_out : num_in, turned ? num_in : num_out},
                            weight.options().dtype(c10::CppTypeToScalarType<T>::value));
  T* const out = result.mutable_data_ptr<T>();
  at::parallel_for(0, num_out / LANES, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float found[COMPONENTS][LANES][LANES], across[LANES][LANES];  // components of 16 x 16 filters
    for (int64_t k = begin * LANES; k < end * LANES; k += LANES)
      for (int64_t c = 0; c < num_in; c += LANES) {
        for (int64_t i = 0; i < LANES; ++i) {
          Lanes filter[9], tile[16];
          for (int64_t j = 0; j < 9; ++j) filter[j] = load(w + ((k + i) * 9 + (turned ? 8 - j : j)) * num_in + c);
          both_ways(transform_filter, filter, tile);
          for (int64_t j = 0; j < COMPONENTS; ++j) store(found[j][i], tile[j]);
        }
        for (int64_t j = 0; j < COMPONENTS; ++j) {
          const float (*rows)[LANES] = found[j];
          if (!turned) {
            at::vec::transpose_mxn<float, LANES, LANES>(found[j][0], LANES, across[0], LANES);
            rows = across;
          }
          const int64_t row = turned ? k : c, column = turned ? c : k, length = turned ? num_in : num_out;
          for (int64_t i = 0; i < LANES; i += PAIR<T>) {
            Lanes pair[2] = {load(rows[i]), load(rows[i + PAIR<T> - 1])};
            _mm512_storeu_si512(out + j * size + (row + i) * length + column * PAIR<T>, paired(out, pair));
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

// (B, H, W, C) * (16, C, K) + (K,) -> (B, H + 2 padding - 2, W + 2 padding - 2, K)
template <class T>
Tensor convolve(const Tensor& x, const Tensor& filters, const Tensor& bias, int64_t padding) {
  const int64_t num_in = x.size(3), num_out = filters.size(2);
  const Images from = images_of(x), to{from.count, from.height + 2 * padding - 2, from.width + 2 * padding - 2};
  const Tiling tiling(to);
  Tensor result = at::empty({to.count, to.height, to.width, num_out}, x.options());
  const T* const image = x.const_data_ptr<T>();
  const T* const filter = filters.const_data_ptr<T>();
  const float* const added = bias.const_data_ptr<float>();
  T* const out = result.mutable_data_ptr<T>();

  const int64_t share = blocks(tiling.count, at::get_num_threads());
  const int64_t together = std::clamp<int64_t>(CACHED / COMPONENTS / num_in, 8, std::max<int64_t>(share, 8));
  const int64_t width = std::min(num_out, std::max<int64_t>(CACHED / 2 / COMPONENTS / together / 64 * 64, 64));
  const int64_t tiles_step = padded<T>(together * num_in), products_step = padded<float>(together * width);
  at::parallel_for(0, blocks(tiling.count, together), 1, [&](int64_t begin, int64_t end) {
    const std::vector<T> zeros(num_in);
    std::vector<T> dump(num_out);  // of pixels below and to the right of images with odd sides
    const Tensor scratch = at::empty({COMPONENTS * tiles_step}, x.options());
    const Tensor sums = at::empty({COMPONENTS * products_step}, bias.options());
    T* const tiles = scratch.mutable_data_ptr<T>();
    float* const products = sums.mutable_data_ptr<float>();
    for (int64_t start = begin * together; start < end * together; start += together) {
      for (int64_t t = 0; t < together; ++t) {
        const T* pixels[16];
        tiling.pixels<4>(start + t, from, image, num_in, padding, zeros.data(), pixels);
        for (int64_t c = 0; c < num_in; c += LANES) {
          Lanes d[16], tile[16];
          load_tile<4>(pixels, c, d);
          both_ways(transform_input, d, tile);
#pragma GCC unroll 16
          for (int64_t i = 0; i < COMPONENTS; ++i) store(tiles + i * tiles_step + t * num_in + c, tile[i]);
        }
      }
      for (int64_t k0 = 0; k0 < num_out; k0 += width) {
        const int64_t num_columns = std::min(width, num_out - k0);
        for (int64_t i = 0; i < COMPONENTS; ++i)
          at::native::cpublas::brgemm(together, num_columns, num_in, num_in, num_out, width, false,
                                      tiles + i * tiles_step, filter + i * num_in * num_out + k0 * PAIR<T>,
                                      products + i * products_step, PAIR<T> == 2);
        for (int64_t t = 0; t < together && start + t < tiling.count; ++t) {
          T* pixels[4];
          tiling.pixels<2>(start + t, to, out, num_out, 0, dump.data(), pixels);
          for (int64_t k = 0; k < num_columns; k += LANES) {
            Lanes m[16], tile[4];
#pragma GCC unroll 16
            for (int64_t i = 0; i < COMPONENTS; ++i) m[i] = load(products + i * products_step + t * width + k);
            both_ways(transform_output, m, tile);
            for (int64_t i = 0; i < 4; ++i) store(pixels[i] + k0 + k, tile[i] + load(added + k0 + k));
          }
        }
      }
    }
    release_products<T>();
  });
  return result;
}

// (B, H, W, C) and the gradient of the result, (B, H, W, K) -> those of weight, (K, 3, 3, C), and bias, (K,), float32
template <class T>
std::tuple<Tensor, Tensor> filter_gradient(const Tensor& x, const Tensor& grad, int64_t padding) {
  constexpr int64_t GROUP = LANES * PAIR<T>;  // tiles of which a channel of one component fills a vector
  const int64_t num_in = x.size(3), num_out = grad.size(3), size = num_in * num_out;
  const Images from = images_of(x), to = images_of(grad);
  const Tiling tiling(to);
  const T* const image = x.const_data_ptr<T>();
  const T* const slope = grad.const_data_ptr<T>();
  const auto floats = x.options().dtype(at::kFloat);

  // For each component, gradients (K, tiles) times inputs (tiles, C).
  if (tiling.count == 0) return {at::zeros({num_out, 3, 3, num_in}, floats), at::zeros({num_out}, floats)};
  const int64_t turns = blocks(tiling.count, std::max(GRADIENT_TILES, GROUP * at::get_num_threads()));
  const int64_t together = blocks(blocks(tiling.count, turns), GROUP) * GROUP;
  const int64_t left_length = padded<T>(together);
  const int64_t left_step = num_out * left_length, right_step = padded<T>(together * num_in);
  const Tensor left_scratch = at::empty({COMPONENTS * left_step}, x.options());
  const Tensor right_scratch = at::empty({COMPONENTS * right_step}, x.options());
  const Tensor sums = at::empty({COMPONENTS, num_out, num_in}, floats);
  const Tensor bias_scratch = at::empty({blocks(tiling.count, GROUP), num_out}, floats);  // of each group
  T* const left = left_scratch.mutable_data_ptr<T>();
  T* const right = right_scratch.mutable_data_ptr<T>();
  float* const products = sums.mutable_data_ptr<float>();
  float* const bias_parts = bias_scratch.mutable_data_ptr<float>();
  const std::vector<T> zeros(std::max(num_in, num_out));
  for (int64_t start = 0; start < tiling.count; start += together) {
    at::parallel_for(0, together / GROUP, 1, [&](int64_t begin, int64_t end) {
      alignas(64) int32_t found[COMPONENTS][LANES][LANES];  // pairs of tiles by channels
      for (int64_t group = begin * GROUP; group < end * GROUP; group += GROUP) {
        const T* pixels[GROUP][4];
        for (int64_t t = 0; t < GROUP; ++t)
          tiling.pixels<2>(start + group + t, to, slope, num_out, 0, zeros.data(), pixels[t]);
        for (int64_t k = 0; k < num_out; k += LANES) {
          Lanes total = lanes(0);
          for (int64_t t = 0; t < GROUP; t += PAIR<T>) {
            Lanes tiles[PAIR<T>][16];
            for (int64_t one = 0; one < PAIR<T>; ++one) {
              Lanes g[4];
              load_tile<2>(pixels[t + one], k, g);
              both_ways(transform_output_gradient, g, tiles[one]);
              total += tiles[one][5];  // the sum of the four
            }
            for (int64_t i = 0; i < COMPONENTS; ++i) {
              const Lanes pair[2] = {tiles[0][i], tiles[PAIR<T> - 1][i]};
              _mm512_store_si512(found[i][t / PAIR<T>], paired(slope, pair));
            }
          }
          if (start + group < tiling.count) store(bias_parts + (start + group) / GROUP * num_out + k, total);
          for (int64_t i = 0; i < COMPONENTS; ++i)  // numbers are only moved, so that it matters not what they mean
            at::vec::transpose_mxn<float, LANES, LANES>(
                reinterpret_cast<float*>(found[i][0]), LANES,
                reinterpret_cast<float*>(left + i * left_step + k * left_length + group), left_length / PAIR<T>);
        }
        for (int64_t t = 0; t < GROUP; t += PAIR<T>) {
          const T* sources[PAIR<T>][16];
          for (int64_t one = 0; one < PAIR<T>; ++one)
            tiling.pixels<4>(start + group + t + one, from, image, num_in, padding, zeros.data(), sources[one]);
          for (int64_t c = 0; c < num_in; c += LANES) {
            Lanes tiles[PAIR<T>][16];
            for (int64_t one = 0; one < PAIR<T>; ++one) {
              Lanes d[16];
              load_tile<4>(sources[one], c, d);
              both_ways(transform_input, d, tiles[one]);
            }
            for (int64_t i = 0; i < COMPONENTS; ++i) {
              const Lanes pair[2] = {tiles[0][i], tiles[PAIR<T> - 1][i]};
              _mm512_storeu_si512(right + i * right_step + (group + t) * num_in + c * PAIR<T>, paired(image, pair));
            }
          }
        }
      }
    });
    const int64_t parts = blocks(num_out, PRODUCT_ROWS);  // so that there is work for more threads than components
    at::parallel_for(0, COMPONENTS * parts, 1, [&](int64_t begin, int64_t end) {
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
        Lanes tile[16], filter[9];
        for (int64_t i = 0; i < COMPONENTS; ++i) tile[i] = load(products + i * size + k * num_in + c);
        both_ways(transform_filter_gradient, tile, filter);
        for (int64_t i = 0; i < 9; ++i) store(out + (k * 9 + i) * num_in + c, filter[i]);
      }
  });
  return {result, bias_scratch.sum(0)};
}

// ---------------------------------------------------------------------------------------------------- group norm

struct Sums {
  Lanes one = lanes(0), two = lanes(0);
};

// The sums of what add(i, sums) adds for i < count: of parts first, so that few digits are lost.
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

// Calls f(image, start, count) for the channels of each image, whole groups of at least a cache line, by all threads.
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

// (B, H, W, C) and gain, shift and offset of each channel, (B, C) float32 -> normalised x + offset, and the mean and
// the inverse deviation of each group, (B, G) float32.
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
    std::vector<float> mean(size), variance(size), centre(size), scale(size);  // of each channel
    for (int64_t c = 0; c < count; c += LANES) {
      // Moments about each channel's first pixel: about 0, a mean of many deviations would drown the variance.
      const __mmask16 mask = first(count - c);
      const Lanes origin = load(from + c, mask);
      const Sums sums = summed(num_pixels, [&](int64_t p, Sums& part) {
        const Lanes distance = load(from + p * num_channels + c, mask) - origin;
        part.one += distance, part.two += distance * distance;
      });
      const Lanes average = sums.one / lanes(num_pixels);
      store(&mean[c], origin + average + load(offsets + channel + c, mask));
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
      const __mmask16 mask = first(count - c);
      const Lanes middle = load(&centre[c]), by = load(&scale[c]), and_added = load(shifts + channel + c, mask);
      for (int64_t p = 0; p < num_pixels; ++p) {
        const Lanes z = (load(from + p * num_channels + c, mask) - middle) * by + and_added;
        store(to + p * num_channels + c, silu ? z * sigmoid(z) : z, mask);
      }
    }
  });
  return {result, means, inverses};
}

// The gradients of x, and of gain, shift and offset of each channel, (B, C).
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
    const std::unique_ptr<float[]> kept(new float[silu ? size * num_pixels : 0]);  // dz, with z what SiLU is applied to
    for (int64_t c = 0; c < count; ++c) {
      const int64_t group = (channel + c) / group_size;
      centre[c] = group_mean[group] - offsets[channel + c];
      scale[c] = gains[channel + c] * group_inverse[group];
    }
    for (int64_t c = 0; c < count; c += LANES) {
      const __mmask16 mask = first(count - c);
      const Lanes middle = load(&centre[c]), by = load(&scale[c]), and_added = load(shifts + channel + c, mask);
      const Sums sums = summed(num_pixels, [&](int64_t p, Sums& part) {
        const Lanes distance = load(from + p * num_channels + c, mask) - middle;
        Lanes dz = load(slope + p * num_channels + c, mask);
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
      const __mmask16 mask = first(count - c);
      const Lanes middle = load(&centre[c]), by = load(&scale[c]), by_distance = load(&by_x[c]);
      const Lanes and_added = load(&added[c]);
      const Sums sums = summed(num_pixels, [&](int64_t p, Sums& part) {
        const int64_t place = p * num_channels + c;
        const Lanes dz = silu ? load(&kept[c * num_pixels + p * LANES]) : load(slope + place, mask);
        const Lanes dx = dz * by + (load(from + place, mask) - middle) * by_distance + and_added;
        part.one += dx;
        store(to + place, dx, mask);
      });
      store(out_offset + channel + c, sums.one, mask);
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
    check(filters, x.scalar_type(), {COMPONENTS, x.size(3), bias.numel()});
    check(bias, at::kFloat, {bias.numel()});
    return with_type(x.scalar_type(),
                     [&](auto number) { return convolve<decltype(number)>(x, filters, bias, padding); });
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
