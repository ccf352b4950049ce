//! Whether a history of concurrent operations is linearizable: each seems to take effect
//! at one moment between its call and its return.
//!
//! Wing and Gong's search as Lowe made it fast: take the first operation that fits, begin
//! again at the front, and step back at a return whose operation was not taken. The same
//! operations taken with the same state behind them are never looked at twice.
//! One history is of one key: taking a history apart by key is the caller's.

use std::collections::HashSet;
use std::hash::Hash;

/// What is right when one operation follows the other.
pub trait Model {
    /// All that later outputs depend on.
    type State: Clone + Eq + Hash;
    /// What was asked.
    type Input;
    /// What was answered. One of its values stands for an answer that nobody got.
    type Output;

    /// The state before the first operation.
    fn initial(&self) -> Self::State;

    /// The state behind the operation; `None` if it can't have had this output in `state`.
    fn step(&self, state: &Self::State, input: &Self::Input, output: &Self::Output) -> Option<Self::State>;
}

/// An operation of a history.
#[derive(Clone, Debug)]
pub struct Op<I, O> {
    /// What was asked.
    pub input: I,
    /// What was answered.
    pub output: O,
    /// When it was called, on a clock that all operations share.
    pub called: u64,
    /// When its answer came. `None`: none came, so it took effect at any time after its
    /// call, or will later, or never; the output is then the model's for "unknown".
    pub returned: Option<u64>,
}

/// Whether some order of the operations is right and keeps to their times. If there is
/// none: those that were to come next, and none of which could, where the search got furthest.
pub fn check<M: Model>(model: &M, ops: &[Op<M::Input, M::Output>]) -> Result<(), Vec<usize>> {
    let is_known = |op: usize| ops[op].returned.is_some();
    let mut timeline = Timeline::of(ops);
    let mut taken = Taken(vec![0; ops.len().div_ceil(64)]);
    let mut state = model.initial();
    // Who was taken, each with the state before it.
    let mut path: Vec<(usize, M::State)> = vec![];
    let mut seen = HashSet::new();
    let mut left = ops.iter().filter(|op| op.returned.is_some()).count();
    let mut furthest = (usize::MAX, vec![]);
    let mut at = timeline.first();
    while left > 0 {
        if let Some(op) = called_at(at) {
            let next = model.step(&state, &ops[op].input, &ops[op].output);
            // An unknown one that changes nothing may as well never have happened.
            if let Some(next) = next.filter(|next| is_known(op) || *next != state) {
                taken.flip(op);
                if seen.insert((taken.clone(), next.clone())) {
                    path.push((op, std::mem::replace(&mut state, next)));
                    timeline.take(op);
                    left -= usize::from(is_known(op));
                    at = timeline.first();
                    continue;
                }
                taken.flip(op);
            }
            at = timeline.after[at];
        } else {
            // An operation returned here that nothing allowed to be taken.
            if left < furthest.0 {
                let calls = timeline.calls_before(at);
                furthest = (left, calls.into_iter().filter(|op| is_known(*op)).collect());
            }
            let Some((op, before)) = path.pop() else { return Err(furthest.1) };
            taken.flip(op);
            timeline.put_back(op);
            left += usize::from(is_known(op));
            state = before;
            at = timeline.after[call_of(op)];
        }
    }
    Ok(())
}

/// A set of operations, a bit each.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Taken(Vec<u64>);

impl Taken {
    fn flip(&mut self, op: usize) {
        self.0[op / 64] ^= 1 << (op % 64);
    }
}

/// Calls and returns in the order of time: a ring of nodes through [`END`], which stands
/// before the first and behind the last. The return of an unknown operation is not in it.
struct Timeline {
    after: Vec<usize>,
    before: Vec<usize>,
}

const END: usize = 0;

fn call_of(op: usize) -> usize {
    1 + 2 * op
}

fn return_of(op: usize) -> usize {
    2 + 2 * op
}

/// The operation whose call this node is.
fn called_at(node: usize) -> Option<usize> {
    (node % 2 == 1).then_some(node / 2)
}

impl Timeline {
    fn of<I, O>(ops: &[Op<I, O>]) -> Timeline {
        let mut nodes = vec![];
        for (i, op) in ops.iter().enumerate() {
            // At the same time calls come first: who may overlap, does.
            nodes.push((op.called, false, call_of(i)));
            if let Some(returned) = op.returned {
                assert!(op.called <= returned, "operation {i} returned before it was called");
                nodes.push((returned, true, return_of(i)));
            }
        }
        nodes.sort_unstable();
        // Nodes that are not in the ring are rings of their own: to take them out changes nothing.
        let alone: Vec<usize> = (0..=2 * ops.len()).collect();
        let mut timeline = Timeline { after: alone.clone(), before: alone };
        let mut last = END;
        for (_, _, node) in nodes {
            timeline.link(last, node);
            last = node;
        }
        timeline.link(last, END);
        timeline
    }

    fn first(&self) -> usize {
        self.after[END]
    }

    fn link(&mut self, before: usize, after: usize) {
        self.after[before] = after;
        self.before[after] = before;
    }

    fn take(&mut self, op: usize) {
        for node in [call_of(op), return_of(op)] {
            let (before, after) = (self.before[node], self.after[node]);
            self.link(before, after);
        }
    }

    /// Undoes the last [`Timeline::take`] that is not undone: a node that was taken out
    /// still knows its neighbours.
    fn put_back(&mut self, op: usize) {
        for node in [return_of(op), call_of(op)] {
            let (before, after) = (self.before[node], self.after[node]);
            self.link(before, node);
            self.link(node, after);
        }
    }

    fn calls_before(&self, node: usize) -> Vec<usize> {
        let nodes = std::iter::successors(Some(self.first()), |at| Some(self.after[*at]));
        nodes.take_while(|at| *at != node).filter_map(called_at).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// A number, zero at first.
    struct Register;

    #[derive(Clone, Copy, Debug)]
    enum Asked {
        Write(u64),
        Read,
    }

    /// A read's value; `None`: nobody knows, or it was no read.
    type Said = Option<u64>;

    impl Model for Register {
        type State = u64;
        type Input = Asked;
        type Output = Said;

        fn initial(&self) -> u64 {
            0
        }

        fn step(&self, state: &u64, input: &Asked, output: &Said) -> Option<u64> {
            match input {
                Asked::Write(value) => Some(*value),
                Asked::Read => output.is_none_or(|value| value == *state).then_some(*state),
            }
        }
    }

    fn write(value: u64, called: u64, returned: u64) -> Op<Asked, Said> {
        Op { input: Asked::Write(value), output: None, called, returned: Some(returned) }
    }

    fn lost_write(value: u64, called: u64) -> Op<Asked, Said> {
        Op { returned: None, ..write(value, called, called) }
    }

    fn read(value: u64, called: u64, returned: u64) -> Op<Asked, Said> {
        Op { input: Asked::Read, output: Some(value), called, returned: Some(returned) }
    }

    #[test]
    fn a_stale_read_is_refused() {
        assert_eq!(check(&Register, &[]), Ok(()));
        assert_eq!(check(&Register, &[read(0, 0, 1), write(1, 2, 3), read(1, 4, 5)]), Ok(()));
        assert_eq!(check(&Register, &[write(1, 0, 10), read(0, 20, 30)]), Err(vec![1]));
        let two = [write(1, 0, 1), write(2, 2, 3), read(1, 4, 5), read(2, 6, 7)];
        assert_eq!(check(&Register, &two), Err(vec![2]));
    }

    #[test]
    fn a_read_during_a_write_sees_either_but_never_goes_back() {
        assert_eq!(check(&Register, &[write(1, 0, 30), read(0, 5, 10), read(1, 12, 20)]), Ok(()));
        assert_eq!(check(&Register, &[write(1, 0, 30), read(1, 5, 10), read(0, 12, 20)]), Err(vec![2]));
        // Calls and returns at the same time overlap.
        assert_eq!(check(&Register, &[write(1, 0, 10), read(0, 10, 20)]), Ok(()));
    }

    #[test]
    fn an_unknown_write_counts_once_or_never() {
        // Seen late, seen by nobody, and gone for good once another has taken its place.
        assert_eq!(check(&Register, &[lost_write(1, 0), read(0, 5, 10), read(1, 20, 30)]), Ok(()));
        assert_eq!(check(&Register, &[lost_write(1, 0), read(0, 5, 10), read(0, 20, 30)]), Ok(()));
        let twice = [lost_write(1, 0), read(1, 5, 10), write(2, 11, 12), read(2, 13, 14), read(1, 15, 16)];
        assert_eq!(check(&Register, &twice), Err(vec![4]));
        let later = [lost_write(1, 0), write(2, 11, 12), read(2, 13, 14), read(1, 15, 16)];
        assert_eq!(check(&Register, &later), Ok(()));
        assert_eq!(check(&Register, &[read(1, 0, 10), lost_write(1, 20)]), Err(vec![0]));
    }

    #[test]
    fn no_set_is_searched_twice() {
        // Without the memory: 12! orders.
        let mut ops: Vec<_> = (1..=12).map(|value| write(value, 0, 100)).collect();
        ops.push(read(99, 200, 201));
        assert_eq!(check(&Register, &ops), Err(vec![12]));
    }

    /// All orders, one by one.
    fn is_right(ops: &[Op<Asked, Said>], taken: &mut Vec<usize>, state: u64) -> bool {
        let left: Vec<usize> = (0..ops.len()).filter(|op| !taken.contains(op)).collect();
        left.iter().all(|op| ops[*op].returned.is_none())
            || left.iter().any(|op| {
                let may_be_next =
                    left.iter().all(|other| ops[*other].returned.is_none_or(|r| r >= ops[*op].called));
                let next = Register.step(&state, &ops[*op].input, &ops[*op].output);
                next.filter(|_| may_be_next).is_some_and(|next| {
                    taken.push(*op);
                    let found = is_right(ops, taken, next);
                    taken.pop();
                    found
                })
            })
    }

    #[test]
    fn all_orders_tried_say_the_same() {
        let mut random = StdRng::seed_from_u64(1);
        let (mut right, mut wrong) = (0, 0);
        for history in 0..20_000 {
            let ops: Vec<_> = (0..random.gen_range(1..6))
                .map(|_| {
                    let (value, called) = (random.gen_range(0..3), random.gen_range(0..20));
                    let returned = called + random.gen_range(0..10);
                    match random.gen_range(0..5) {
                        0 => lost_write(value, called),
                        1 | 2 => write(value, called, returned),
                        _ => read(value, called, returned),
                    }
                })
                .collect();
            let expected = is_right(&ops, &mut vec![], 0);
            *if expected { &mut right } else { &mut wrong } += 1;
            assert_eq!(check(&Register, &ops).is_ok(), expected, "history {history}: {ops:?}");
        }
        assert!(right > 1000 && wrong > 1000, "{right} right, {wrong} wrong");
    }
}
