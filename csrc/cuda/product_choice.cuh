// Which tile a product takes for a live count, and among how many programs it shares a tile's K: for the host.
#pragma once
#include "product.h"
#include "product_tiles.cuh"

namespace consistentee {
namespace cuda {

// The tile and the shares for a live count, by what they take in ns: rounds of the device times a tile's time. A step
// takes what its bytes take at 84 GB/s; the beginning and end of a tile are fitted to measured launches. Partial sums
// are written and read at 5 500 bytes a ns (reckoned), instead of one row of 16 bits.
struct Choice {
  uint32_t path, doublings, cost;
};
template <class T>
void consider(Choice& best, const ProductCall& call, uint32_t path, uint32_t live, uint32_t programs, uint32_t most) {
  constexpr uint32_t kTile = T::columns == 192 ? 2400 : 1300, kJoin = 2000, kPartial = 300;
  const auto inputs = static_cast<uint32_t>(call.inputs), outputs = static_cast<uint32_t>(call.outputs);
  const bool leaves = call.partials != nullptr;
  if (!leaves) most = call.workspace != nullptr && T::split ? 3 : 0;
  if (T::turns) most = 0;
  for (uint32_t doublings = 0; doublings <= most; ++doublings) {
    const Plan plan = plan_of<T>(live, inputs, outputs, 1u << doublings);
    if (doublings > 0 && (plan.items > programs || 2 * plan.shares >= plan.steps)) break;
    const uint32_t rounds = (plan.items + programs - 1) / programs;
    const uint32_t product = plan.steps / plan.shares * (T::bytes / 84);
    // In turn, the last tile alone is stored while nothing is multiplied, by one warpgroup where else there are two.
    uint32_t cost = T::turns ? rounds * product + 2 * kTile : rounds * (product + kTile);
    if (doublings > 0) cost += leaves ? kPartial + live * outputs / 1375 * (2 * plan.shares - 1) : rounds * kJoin;
    if (cost < best.cost) best = {path, doublings, cost};
  }
}
inline Choice choose(const ProductCall& call, uint32_t live, uint32_t programs, uint32_t most) {
  Choice best = {0, 0, ~0u};
  const auto may = [&](int path) { return call.path < 0 || call.path == path; };
  if (may(0)) consider<Tile0>(best, call, 0, live, programs, most);
  if (may(1)) consider<Tile1>(best, call, 1, live, programs, most);
  // Many outputs have tiles enough: there path 3 gains too little to be worth its code.
  if (call.path == 3 || (may(3) && call.outputs <= 1024)) consider<Tile3>(best, call, 3, live, programs, most);
  if (may(2)) consider<Tile2>(best, call, 2, live, programs, most);
  if (may(4)) consider<Tile4>(best, call, 4, live, programs, most);
  return best;
}

// For every count of the table. Partial sums become fewer with more rows and never more again, so that two limits tell
// a reader how many there are. The last entry, which stands for all greater counts, has none: their memory has an end;
// it is chosen for four times its count, where many rounds decide.
inline void choose_all(const ProductCall& call, uint32_t programs, Choice (&choices)[kChoices]) {
  uint32_t most = 2;
  for (uint32_t i = 0; i < kChoices; ++i) {
    if (i == kChoices - 1) most = 0;
    const uint32_t live = (i == kChoices - 1 ? 4 * kChoices : i + 1) * kChoiceRows;
    choices[i] = choose(call, live, programs, most);
    most = choices[i].doublings;
  }
}

}  // namespace cuda
}  // namespace consistentee
