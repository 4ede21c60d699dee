// The exact assignment of one problem by shortest augmenting paths (Jonker and Volgenant 1987), once for the CPU and for CUDA.
//
// The shorter side of a problem are its rows (so rows <= columns), whichever of templates and proposals that is. The linear
// program and its dual, for prices a of rows and b of columns:
//     minimise  sum C_ij X_ij + sum alone_i s_i     over  sum_j X_ij + s_i = 1,  sum_i X_ij <= 1,  X, s >= 0
//     C_ij >= a_i + b_j, equal where matched;  a_i <= alone_i, equal where i is alone;  b_j <= start_j, equal where j is free.
// Only b is kept: a_i is C_ij - b_j of its match. Two phases:
//   bids     each row takes its cheapest column and lowers the column's price to where its second choice is as good; who had
//            the column bids next. What is left after a limited number of bids goes to
//   paths    Dijkstra's algorithm over C_ij - a_i - b_j from the row to the nearest free column, or to the nearest row of the
//            tree that may rather stay alone.
// Once alone, always alone: such a row has no column, so no path leads to it. On a path, a free column comes before staying
// alone at the same length, so of all optima one with the most matches is found: only the end of a path decides whether there
// is one match more.
//
// Where rows may not choose to stay alone, alone_i is one number L above everything else: most matches first, then least cost.
// L is never a number here. A row that reaches no free column closes all that it reached: those rows' prices rise by L, those
// columns' fall by L, so that the rest of the problem has no use for them, and price -infinity keeps them out. They are opened
// again (with the finite part of their prices) for a row that reaches no free column either: one of those that it reaches
// stays alone then, and every distance counted is one behind L.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define DMM_ON_DEVICE __device__ __forceinline__
#else
#define DMM_ON_DEVICE inline
#endif

namespace dmm {

struct AssignmentArrays {
  // of columns
  double* price;         // b; -infinity while in the tree, and where closed
  double* distance;      // from the row that looks for a column; infinity in the tree
  double* closed_price;  // the finite part of b where closed, infinity where not; written when the first column closes
  int32_t* row_of;       // -1: free
  // of rows
  int32_t* column_of;  // -1: alone, or not served yet
  int32_t* waiting;    // rows that are left for the second phase
  // The tree's entries in the order in which they were reached: a column, its distance and price, its row, and that row's
  // distance less its price. Entry 0 is the row that looks for a column.
  int32_t *tree_column, *tree_row;
  double *tree_distance, *tree_price, *tree_base;
};

// The least C_ij - b_j or distance over the columns; among equal ones a free column, then the first.
struct Nearest {
  double value;  // infinity: none
  int32_t column;
};

struct TwoNearest {
  double value, second;
  int32_t column;
};

// A Team is who works on the problem, all threads of it in step:
//   rows, columns, chooses              sizes; whether rows may choose to stay alone
//   cost(i, j), alone(i)                numbers; infinity where the pair is forbidden
//   start_price(j)                      the price of a free column
//   nearest(i, base)                    distance_j = min(distance_j, (C_ij - b_j) + base), and the nearest column
//   two_nearest(i)                      the least and second least C_ij - b_j
//   last(count, test)                   the last k < count with test(k); there is one
//   greatest(count, value)              the greatest value(k), -infinity of none
//   each(count, act)                    act(k) for all k < count, shared between threads
//   owns(j), leads()                    is this the thread for column j, for everything else?
//   sync()                              wait for each other, and see each other's writes
//   take(j)                             told that column j is free no more; by its owner
template <typename Team>
class AssignmentSolver {
 public:
  DMM_ON_DEVICE AssignmentSolver(Team& team, const AssignmentArrays& arrays) : team_(team), at_(arrays) {}

  DMM_ON_DEVICE void solve() {
    team_.each(team_.columns, [&](int32_t j) {
      at_.price[j] = team_.start_price(j);
      at_.row_of[j] = -1;
    });
    team_.each(team_.rows, [&](int32_t i) { at_.column_of[i] = -1; });
    closed_ = false;
    team_.sync();
    const int32_t waiting = bid();
    for (int32_t w = 0; w < waiting; ++w) serve(at_.waiting[w]);
  }

  // A number that may stand for L in row_price and column_price after solve().
  DMM_ON_DEVICE double limit() {
    if (team_.chooses) return 0;
    const double least = team_.greatest(team_.rows, [&](int32_t i) { return stands_behind_limit(i) ? 0 : row_price(i, 0); });
    double limit = least > 0 ? least : 0;
    if (!closed_) return limit;
    for (int32_t i = -1; i < team_.rows; ++i) {
      if (i >= 0 && stands_behind_limit(i)) continue;
      const double own = i < 0 ? 0 : row_price(i, 0);
      const double more = team_.greatest(team_.columns, [&](int32_t j) {  // b_j <= 0; a_i + b_j <= C_ij
        return closed(j) ? own + at_.closed_price[j] - (i < 0 ? 0 : team_.cost(i, j)) : -kInfinity;
      });
      limit = more > limit ? more : limit;
    }
    return limit;
  }

  DMM_ON_DEVICE double row_price(int32_t i, double limit) const {
    const int32_t j = at_.column_of[i];
    if (j < 0) return team_.chooses ? team_.alone(i) : limit;
    return closed(j) ? team_.cost(i, j) - at_.closed_price[j] + limit : team_.cost(i, j) - at_.price[j];
  }

  DMM_ON_DEVICE double column_price(int32_t j, double limit) const {
    return closed(j) ? at_.closed_price[j] - limit : at_.price[j];
  }

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  DMM_ON_DEVICE bool closed(int32_t j) const { return closed_ && at_.closed_price[j] < kInfinity; }
  DMM_ON_DEVICE bool stands_behind_limit(int32_t i) const { return at_.column_of[i] < 0 || closed(at_.column_of[i]); }

  DMM_ON_DEVICE void match(int32_t i, int32_t j) {
    if (team_.leads()) at_.row_of[j] = i, at_.column_of[i] = j;
    if (team_.owns(j)) team_.take(j);
  }

  // Returns how many rows wait.
  DMM_ON_DEVICE int32_t bid() {
    int32_t waiting = 0;
    int32_t bids = team_.rows;  // that take a column from its row; more were slower where rows resemble each other
    for (int32_t first = 0; first < team_.rows; ++first)
      for (int32_t i = first; i >= 0;) {
        const TwoNearest at = team_.two_nearest(i);
        const double alone = team_.chooses ? team_.alone(i) : kInfinity;
        if (alone < at.value) break;  // for good: prices only fall
        const double second = at.second < alone ? at.second : alone;
        const int32_t former = at.value < kInfinity ? at_.row_of[at.column] : i;
        const bool lowers = second < kInfinity && at.value < second;
        if (former >= 0 && !(lowers && former != i && --bids > 0)) {
          if (team_.leads()) at_.waiting[waiting] = i;
          ++waiting;
          break;
        }
        team_.sync();  // all have read what follows
        match(i, at.column);
        if (lowers && team_.owns(at.column)) at_.price[at.column] -= second - at.value;
        if (former >= 0 && team_.leads()) at_.column_of[former] = -1;
        team_.sync();
        i = former;
      }
    team_.sync();
    return waiting;
  }

  // Matches row i, or leaves one row of its tree alone.
  DMM_ON_DEVICE void serve(int32_t i) {
    team_.each(team_.columns, [&](int32_t j) { at_.distance[j] = kInfinity; });
    int32_t count = 0, live = 0;  // entries; those reached before closed columns were opened
    int32_t lone = 0;             // the entry whose row stays alone at the least cost, which is lone_at
    double lone_at = kInfinity, base = 0;
    bool behind_limit = false;
    const auto consider = [&](int32_t entry, double cost) {
      if (cost < lone_at) lone_at = cost, lone = entry;
    };
    push(count, -1, 0, 0, i, base);
    Nearest end;
    for (;;) {
      end = team_.nearest(i, base);
      if (team_.chooses)
        consider(count - 1, team_.alone(i) + base);
      else if (behind_limit)
        consider(count - 1, base);
      else if (!(end.value < kInfinity)) {
        behind_limit = true, live = count;
        team_.sync();
        for (int32_t k = 0; k < count; ++k) consider(k, at_.tree_base[k]);
        if (closed_) {
          team_.each(team_.columns, [&](int32_t j) {
            if (closed(j)) at_.price[j] = at_.closed_price[j];
          });
          team_.sync();
          for (int32_t k = 0; k < count; ++k) end = team_.nearest(at_.tree_row[k], at_.tree_base[k]);
        }
      }
      if (behind_limit ? lone_at <= end.value : lone_at < end.value) break;
      const int32_t j = end.column;
      if (at_.row_of[j] < 0) break;
      i = at_.row_of[j];
      const double price = at_.price[j];
      base = end.value - (team_.cost(i, j) - price);
      team_.sync();  // all have read the price
      if (team_.owns(j)) at_.price[j] = -kInfinity, at_.distance[j] = kInfinity;
      push(count, j, end.value, price, i, base);
    }
    team_.sync();
    const bool stays = behind_limit || lone_at < end.value;
    const double length = stays ? lone_at : end.value;
    if (behind_limit) return close(count, live, lone, length);
    if (stays)
      leave(lone);
    else
      lead(end.column, end.value, at_.price[end.column], count);
    team_.sync();
    team_.each(count, [&](int32_t k) {
      if (k > 0) at_.price[at_.tree_column[k]] = at_.tree_price[k] + (at_.tree_distance[k] - length);
    });
    team_.sync();
  }

  DMM_ON_DEVICE void push(int32_t& count, int32_t j, double distance, double price, int32_t i, double base) {
    if (team_.leads()) {
      at_.tree_column[count] = j, at_.tree_distance[count] = distance, at_.tree_price[count] = price;
      at_.tree_row[count] = i, at_.tree_base[count] = base;
    }
    ++count;
  }

  // Gives column j, which lies at `distance` by its `price`, to a row that reached it first, that row's column to a row that
  // reached that, and so on. Only the first `count` entries come into question. Looking for them from the last one on, as any
  // will do, takes `count` looks for the whole path.
  DMM_ON_DEVICE void lead(int32_t j, double distance, double price, int32_t count) {
    while (count > 0) {
      const int32_t k = team_.last(count, [&](int32_t k) {  // as nearest() computes it, to the bit
        return (team_.cost(at_.tree_row[k], j) - price) + at_.tree_base[k] == distance;
      });
      match(at_.tree_row[k], j);
      j = at_.tree_column[k], distance = at_.tree_distance[k], price = at_.tree_price[k];
      count = k;
    }
  }

  // The row of this entry stays alone.
  DMM_ON_DEVICE void leave(int32_t entry) {
    if (team_.leads()) at_.column_of[at_.tree_row[entry]] = -1;
    lead(at_.tree_column[entry], at_.tree_distance[entry], at_.tree_price[entry], entry);
  }

  // The same, and closes what was reached. The first `live` entries were not closed yet.
  DMM_ON_DEVICE void close(int32_t count, int32_t live, int32_t entry, double length) {
    leave(entry);
    team_.each(team_.columns, [&](int32_t j) {
      if (!closed_)
        at_.closed_price[j] = kInfinity;
      else if (closed(j))
        at_.price[j] = -kInfinity;
    });
    if (live > 1) closed_ = true;
    team_.sync();
    team_.each(count, [&](int32_t k) {
      if (k > 0) at_.closed_price[at_.tree_column[k]] = at_.tree_price[k] + (at_.tree_distance[k] - length);
    });
    team_.sync();
  }

  Team& team_;
  const AssignmentArrays at_;
  bool closed_ = false;  // some column is
};

}  // namespace dmm
