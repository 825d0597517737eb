// What Python hands to the kernels: plain structs of 64-bit fields, mirrored in ../abi.py.
//
// Arrays are channels-last: [images, height, width, channels] of float or bf16 ("storage"), with
// a pixel stride in elements where an array is a slice of channels. `channels` is a multiple of
// the vector width. M = images * out_height * out_width.
#pragma once

#include <cstdint>

namespace pdarts {

enum Kind : int64_t {
  kConv = 0,       // y = pointwise(depthwise(a)), a = relu(x) or relu(input * scale + shift)
  kMaxPool = 1,    // y = 3x3 maximum of x, padding 1
  kAvgPool = 2,    // y = 3x3 mean of x over the pixels inside the image
  kFactorized = 3, // y = conv(relu(x)) at even pixels + conv(relu(x)) at odd pixels
  kPointwise = 4,  // y = conv1x1(relu(x))
  kSkip = 5,       // x itself, with dropout if stream >= 0
  kPatches = 6,    // y = conv(x) without ReLU, of an image that is padded already
};

inline bool is_pool(int64_t kind) { return kind == kMaxPool || kind == kAvgPool; }

// One operation of one edge, or one half of a separable convolution.
struct Branch {
  int64_t kind, kernel, dilation, stride, padding;
  int64_t stream;                // dropout stream of a skip, -1 for none
  const float* depthwise;        // [C, kernel, kernel]
  const float* pointwise;        // [C, Cx]; rows below real_channels / 2 of a
                                 // kFactorized read even pixels, the others odd ones;
                                 // [C, kernel, kernel, Cx] of a kPatches, rows padded to vectors
  const float* pointwise_odd;    // those, or null if they follow
  void* y;                       // [M, C] storage: output before BatchNorm; null of a pool that
                                 // is stored nowhere: mix, reduce and fan_in compute it anew
  const void* input;             // [M, C] storage: what the second half of a separable reads, or
                                 // a skip; the source of such a pool
  int64_t input_stride, input_height, input_width;
  const float* scale;            // [C], meaning: see each primitive
  const float* shift;            // [C]
  const void* grad;              // [M, C] storage: gradient of the normalised output
  int64_t grad_stride;
  const float* coef;             // [3, C]: dy = coef[0] * grad + coef[1] * y + coef[2]
  void* grad_input;              // [M, C] storage, written
  double* sums;                  // [2, C], written
  float* grad_depthwise;         // [C, kernel, kernel], written; null if nobody asks
  float* grad_pointwise;         // like pointwise, written; null if nobody asks
  const uint8_t* mask;           // [M, C] of a skip: 1 where its dropout keeps, or null
  uint8_t* kept;                 // [M, C] bits of a skip with a stream: what its dropout keeps, written
                                 // by mix and read by the others; null if all find out themselves
};

struct Task {
  int64_t images, in_height, in_width, out_height, out_width;
  int64_t in_channels;           // Cx, of x
  int64_t in_parts;              // arrays in which x, out and incoming of a fan_out or fan_in with 1x1
                                 // convolutions lie, one behind the other, with Cx / in_parts channels each
  int64_t channels;              // C, of y
  int64_t real_channels;         // C without padding: what the dropout stream counts
  int64_t bf16, threads, groups;
  int64_t num_branches;
  Branch* branches;
  const void* x;                 // [images, in_height, in_width, Cx] storage
  int64_t x_stride;
  void* out;                     // written
  int64_t out_stride;
  const void* incoming;          // fan_in: gradient to add, or null
  int64_t incoming_stride;
  const float* scale;            // fan_out: x is replaced by x * scale + shift first; or null
  const float* shift;            // [C], mix: to add
  double* sums;                  // reduce: [C], sum of the gradient; fan_in: [2, Cx], sums of out and of
                                 // out * x, or null
  const int64_t* dropout_state;  // seed, step
  const float* dropout_rate;     // [1]
};

// One operation of an edge, or one half of a separable convolution, as in ../../calls.py.
struct Item {
  int64_t kind, kernel, dilation, stride, padding;
  int64_t stream;                // dropout stream of a skip, -1 for none
  int64_t slot, input, half, source, node;
  int64_t place, input_place;    // where outputs of slot and input lie in y, -1 for nowhere
  int64_t depthwise, pointwise;  // offsets into the gradient of the weights, -1 for none
  int64_t depthwise_weight, pointwise_weight;  // numbers of weights; a kFactorized has the next, too
  int64_t alpha;                 // place in the table of alphas
  int64_t norm, input_norm;      // rows of the normalisations in evaluation
  int64_t mask;                  // number of a skip's mask if masks are given, -1 for none
  int64_t kept;                  // number of a skip with a dropout stream, -1 for none
};

struct Call {
  int64_t count, normed;         // items; those with a BatchNorm come first
  const Item* items;
};

// Calls of a cell: of both inputs, by source, by node, and by wanted inputs and node.
struct CellCalls {
  int64_t steps, slots, halves, alphas, norms;
  const Call *inputs, *leave, *second, *enter, *enter_second, *gather;
};

// A pass of a cell. Arrays as in ../../cell_pass.py; "storage" is float or bf16.
struct CellTask {
  const CellCalls* calls;
  int64_t images, height, width; // of nodes
  int64_t channels, real_channels, bf16, threads, training;
  int64_t in_height[2], in_width[2], in_channels[2];
  int64_t in_parts[2];           // arrays in which an input and its gradient lie, one behind the other
  int64_t state_height[2], state_width[2];
  const void* inputs[2];         // storage
  void* states[2];               // storage
  int64_t apart;                 // whether nodes, and grad, are [steps, M, C] instead
  void* nodes;                   // storage [M, steps * C]
  void* y;                       // storage [places, M, C]
  double* norms;                 // [rows, 2, C]
  double* stats;                 // like norms
  const double* alphas;
  const float* const* weights;   // every weight
  const float* dropout_rate;
  const int64_t* dropout_state;
  const uint8_t* masks;          // [masks, M, C]: 1 where a skip's dropout keeps, or null
  const double* mask_factors;    // [masks]: what is kept is multiplied by
  uint8_t* kept;                 // [skips with a stream, M, C] bits; or null, or C is no multiple of 8
  // Backward:
  const void* grad;              // storage [M, steps * C]
  void* node_grads;              // storage [steps - 1, M, C], room
  void* half_grads;              // storage [halves, M, C], room
  void* state_grads[2];          // storage, room, or null if nobody asks
  void* grad_inputs[2];          // storage, written, or null if nobody asks
  int64_t adds[2];               // whether that of an input is added to what is there
  double* grad_alphas;           // written
  float* grad_weights;           // written, or null if nobody asks
};

// Masks as torch's generator draws them for images [images, channels, pixels]; see draw.cpp.
struct DrawTask {
  uint32_t* words;               // [624]: block of the Mersenne twister, updated
  int64_t* used;                 // words of the block that were drawn, updated
  int64_t masks, images, channels, pixels, threads;
  int64_t padded;                // channels of `out`; those behind `channels` are 0
  const uint64_t* thresholds;    // [masks]: 1 for a 53-bit number below it
  uint8_t* out;                  // [masks, images, pixels, padded], written
};

// Running statistics of a cell's BatchNorms, to be moved towards those of the batch.
struct RunningTask {
  int64_t norms, channels, padded;
  const int64_t* slots;          // [norms]: rows of stats
  float* const* running;         // [norms, 2]: arrays of mean and variance, [channels] each, updated
  int64_t* const* batches;       // [norms]: counters, updated
  const double* stats;           // [rows, 2, padded]: mean and biased variance
  const double* unbiased;        // [norms]: factors of the variances
  double momentum;
};

using Primitive = void (*)(const Task&);
using Draw = void (*)(const DrawTask&);

enum PrimitiveIndex { kFanOut, kMid, kAffine, kMix, kReduce, kMidBackward, kFanIn, kNumPrimitives };

struct Variant {
  const char* name;
  int64_t width;                 // floats in a vector
  Primitive primitives[kNumPrimitives];
  Draw draw;
};

}  // namespace pdarts
