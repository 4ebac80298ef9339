//! A mesh larger than the scenarios', with the code and in the steps of `mesh-lab bench --parts scale`: what has to hold at a thousand
//! nodes holds here with room to spare.
#![allow(clippy::unwrap_used)]

mod common;

use common::bins;
use netns_tests::bench::scale::{self, Size};

/// 60 simulated agents, of which ten follow the thousand pods.
const SIZE: Size = Size {
    nodes: 60,
    agents: 60,
    pods_each: 17,
    own_pods: 20,
    with_pods: 10,
    changes: 20,
    rest_s: 30,
    batch: 20,
};

/// Requests of one agent from its start until it is at rest: two pages of pods, a list of each other kind, and what it
/// reads and writes of its own Node, status and events; and half as many again.
const REQUESTS_OF_A_START: f64 = 18.0;

#[test]
fn a_mesh_of_sixty_nodes_converges_rests_and_restarts_without_hammering_the_api_server() {
    let found = scale::run(&bins(), SIZE).unwrap();
    let (_, p99, _) = found.change_ms;
    assert!(found.converged_s < 10.0, "{found:?}");
    assert!(p99 < 10_000.0, "{found:?}");
    assert_eq!(found.rest_lists, 0, "{found:?}");
    assert!(found.rest_writes <= 1.0, "{found:?}");
    let (seconds, mean, peak) = found.restart;
    let agents = f64::from(SIZE.agents + 1);
    assert!(seconds * mean <= REQUESTS_OF_A_START * agents, "{found:?}");
    // Twenty at a time, each of which would send all it has to say within one second.
    assert!(peak <= REQUESTS_OF_A_START * SIZE.batch as f64 * 3.0, "{found:?}");
}
