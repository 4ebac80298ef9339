//! Who gets what more than one node claims.
//!
//! Keys, prefixes and addresses are all ranges on a line; bids whose ranges overlap exclude each other.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::key::PublicKey;

/// Something only one node can have.
pub(super) trait Range: Copy {
    type Point: Ord + Copy;
    /// First and last point.
    fn span(&self) -> (Self::Point, Self::Point);
}

impl Range for PublicKey {
    type Point = PublicKey;
    fn span(&self) -> (PublicKey, PublicKey) {
        (*self, *self)
    }
}

impl Range for IpAddr {
    type Point = IpAddr;
    fn span(&self) -> (IpAddr, IpAddr) {
        (*self, *self)
    }
}

impl Range for IpNet {
    // The order of `IpAddr` puts all of IPv4 before IPv6, so a span never crosses families.
    type Point = IpAddr;
    fn span(&self) -> (IpAddr, IpAddr) {
        (self.network(), self.broadcast())
    }
}

/// How well founded a bid is; the larger wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Standing {
    /// Whether an authority says so. Above any memory.
    pub(super) backed: bool,
    pub(super) tenure: Tenure,
}

/// How long a bidder is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tenure {
    /// Never admitted.
    Newcomer,
    /// Admitted before, with something else.
    Known,
    /// Admitted before with this very thing.
    Holder,
    /// This node itself, for what it cannot be wrong about.
    Own,
}

/// One node's wish for one thing.
pub(super) struct Bid<T> {
    /// Whose; bids of one party do not exclude each other.
    pub(super) party: usize,
    pub(super) item: T,
    pub(super) standing: Standing,
    /// All or nothing: losing this bid loses every bid of the party.
    pub(super) whole: bool,
}

/// What became of a bid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Won,
    /// Some other party has it.
    Lost(usize),
    /// Nobody has it: nothing says whether it is this party's.
    Tied(usize),
    /// Given up because an all-or-nothing party lost another bid.
    Forfeited,
}

/// Decides all bids, those of the best standing first.
pub(super) fn contest<T: Range>(bids: &[Bid<T>]) -> Vec<Outcome> {
    let rivals = Rivals::new(bids);
    let mut outcomes: Vec<Option<Outcome>> = vec![None; bids.len()];
    let mut standings: Vec<Standing> = bids.iter().map(|bid| bid.standing).collect();
    standings.sort();
    standings.dedup();
    for standing in standings.into_iter().rev() {
        let level: Vec<usize> = (0..bids.len()).filter(|i| bids[*i].standing == standing).collect();
        let open = |outcomes: &[Option<Outcome>]| -> Vec<usize> {
            level.iter().copied().filter(|i| outcomes[*i].is_none()).collect()
        };
        // What a better standing won is gone, and what tied there is nobody's.
        let lost = open(&outcomes).into_iter().filter_map(|i| {
            let rival = |j: &usize| matches!(outcomes[*j], Some(Outcome::Won | Outcome::Tied(_)));
            let j = rivals.of(i).filter(rival).min_by_key(|j| bids[*j].party)?;
            let tied = matches!(outcomes[j], Some(Outcome::Tied(_)));
            Some((i, if tied { Outcome::Tied(bids[j].party) } else { Outcome::Lost(bids[j].party) }))
        });
        settle(bids, lost.collect(), &mut outcomes);
        let tied = open(&outcomes).into_iter().filter_map(|i| {
            let rival = |j: &usize| outcomes[*j].is_none() && bids[*j].standing == standing;
            rivals.of(i).filter(rival).map(|j| bids[j].party).min().map(|party| (i, Outcome::Tied(party)))
        });
        settle(bids, tied.collect(), &mut outcomes);
        for i in open(&outcomes) {
            outcomes[i] = Some(Outcome::Won);
        }
    }
    // Every standing was visited, so every bid has its outcome.
    outcomes.into_iter().map(|outcome| outcome.unwrap_or(Outcome::Forfeited)).collect()
}

/// Records losses, and what all-or-nothing parties give up with them.
fn settle<T>(bids: &[Bid<T>], losses: Vec<(usize, Outcome)>, outcomes: &mut [Option<Outcome>]) {
    let mut quitters: Vec<usize> = Vec::new();
    for (i, outcome) in losses {
        outcomes[i] = Some(outcome);
        if bids[i].whole {
            quitters.push(bids[i].party);
        }
    }
    quitters.sort_unstable();
    for (bid, outcome) in bids.iter().zip(outcomes) {
        if outcome.is_none() && quitters.binary_search(&bid.party).is_ok() {
            *outcome = Some(Outcome::Forfeited);
        }
    }
}

/// Bids grouped by where they lie, so that a bid is compared only with those near it.
struct Rivals<'a, T> {
    bids: &'a [Bid<T>],
    groups: Vec<Vec<usize>>,
    group_of: Vec<usize>,
}

impl<'a, T: Range> Rivals<'a, T> {
    fn new(bids: &'a [Bid<T>]) -> Self {
        // Sweep along the line: a group ends where no range reaches on. Most groups are a single bid.
        let mut order: Vec<usize> = (0..bids.len()).collect();
        order.sort_by_key(|i| bids[*i].item.span());
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut group_of = vec![0; bids.len()];
        let mut reach = None;
        for i in order {
            let (first, last) = bids[i].item.span();
            if reach.is_none_or(|reach| first > reach) {
                groups.push(Vec::new());
            }
            reach = reach.max(Some(last));
            group_of[i] = groups.len() - 1;
            groups[group_of[i]].push(i);
        }
        Self { bids, groups, group_of }
    }

    /// The bids of other parties that overlap bid `i`.
    fn of(&self, i: usize) -> impl Iterator<Item = usize> {
        let bid = &self.bids[i];
        let (first, last) = bid.item.span();
        self.groups[self.group_of[i]].iter().copied().filter(move |j| {
            let other = &self.bids[*j];
            let (other_first, other_last) = other.item.span();
            other.party != bid.party && first <= other_last && other_first <= last
        })
    }
}
