//! How long a look-up in the allowed IPs takes, by how many prefixes there are: for `mesh-lab bench`.
//!
//! Prints `PREFIXES NANOSECONDS` lines: the least of some runs, each over addresses in random order, so that the caches
//! hold what they would hold with that many peers in use at once.
#![allow(clippy::disallowed_methods)]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use ipnet::IpNet;
use mesh_datapath::allowed_ips::AllowedIps;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

const LOOKUPS: usize = 200_000;
const RUNS: usize = 7;

fn main() -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(1);
    for count in [1u32, 1_000, 10_000] {
        let mut table = AllowedIps::default();
        let mut addresses = Vec::new();
        for number in 0..count {
            // A pod CIDR of /24 a peer, as in a cluster.
            let base = u32::from(Ipv4Addr::new(10, 0, 0, 0)) + (number << 8);
            table.insert(IpNet::new(IpAddr::V4(base.into()), 24)?, number);
            addresses.push(IpAddr::V4((base + 1 + number % 250).into()));
        }
        addresses.shuffle(&mut rng);
        let mut least = f64::INFINITY;
        for _ in 0..RUNS {
            let begin = Instant::now();
            for address in addresses.iter().cycle().take(LOOKUPS) {
                black_box(table.longest_match(black_box(*address)));
            }
            least = least.min(begin.elapsed().as_secs_f64() * 1e9 / LOOKUPS as f64);
        }
        println!("{count} {least:.1}");
    }
    Ok(())
}
