// Search in the order of drawing (weight descending, id ascending) without sorting it.
//
// The wanted token's weight is found by bisection: each step sums, in one vectorised pass, what lies above the
// middle. The middle is taken on the scale of fp32 bits, which is nearly logarithmic as weights are. Once few
// tokens are left between the bounds they are collected, and further steps look at those alone. Tokens of one
// weight share a mass evenly, so the place among them is a division. With a model's logits that is about three
// passes over the vocabulary; with any others, at most 28.

#pragma once

#include <cstdint>

namespace kvferry {

class Descent {
  public:
    // One token in the order of drawing.
    struct Place {
        uint32_t token;
        uint64_t mass;  // weight of the tokens up to and including it
    };

    // Weights as `weigh` makes them. `candidates` [2 * count] is scratch. Both must outlive this.
    Descent(const int32_t *weights, int32_t count, uint32_t *candidates);

    uint64_t mass() const { return all_.mass; }                                // of all tokens
    int64_t num_weighing() const { return static_cast<int64_t>(all_.tokens); }  // tokens whose weight is not 0

    // The first token whose cumulated weight exceeds `mass`, which must be below `mass()`.
    Place by_mass(uint64_t mass) const;
    // The token of a rank, from 0; below `num_weighing()`.
    Place by_rank(int64_t rank) const;

    struct Sum {
        uint64_t mass;
        uint64_t tokens;
    };

  private:
    template <uint64_t Sum::*member>
    Place find(uint64_t target) const;

    const int32_t *weights_;
    int32_t count_;
    int32_t *candidate_weights_;
    uint32_t *candidate_tokens_;
    Sum all_;
};

}  // namespace kvferry
