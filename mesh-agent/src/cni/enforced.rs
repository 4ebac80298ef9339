//! Has a new endpoint got its policy and its routes? Pure.

use std::net::IpAddr;

use crate::reconcile::ReconcileError;
use crate::status::{Observed, Pass};

/// Reconcilers whose work no pod's first packet on this node waits for: without a peer or with a missing
/// datapath, pods of one node still reach each other.
const NOT_AWAITED: [&str; 2] = ["wireguard", "masquerade"];
const POLICY: &str = "policy";

/// Whether every reconciler has carried out `generation` as far as this endpoint goes; if not, who has not.
/// Another object's trouble does not hold the pod up.
pub(super) fn enforced(
    seen: &Observed,
    generation: u64,
    interface: &str,
    ips: &[IpAddr],
) -> Result<(), String> {
    if !seen.reconcilers.iter().any(|row| row.name == POLICY) {
        return Err("there is no policy reconciler".to_owned());
    }
    for row in seen.reconcilers.iter().filter(|row| !NOT_AWAITED.contains(&row.name.as_str())) {
        let name = &row.name;
        let Some(pass) = seen.passes.get(name).filter(|pass| pass.generation >= generation) else {
            return Err(format!("{name}: pending"));
        };
        if let Some(error) = standing_in_the_way(name, pass, interface, ips) {
            return Err(format!("{name}: {error}"));
        }
    }
    Ok(())
}

fn standing_in_the_way<'a>(
    name: &str,
    pass: &'a Pass,
    interface: &str,
    ips: &[IpAddr],
) -> Option<&'a ReconcileError> {
    pass.errors.iter().find(|error| {
        // Policy is closed for all where it could not be written; only another link's trouble is not ours.
        let of_everyone = pass.aborted || (name == POLICY && !error.object.starts_with("link "));
        of_everyone || concerns(&error.object, interface, ips)
    })
}

fn concerns(object: &str, interface: &str, ips: &[IpAddr]) -> bool {
    let words = object.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, ':' | '.')));
    words.into_iter().any(|word| word == interface || word.parse().is_ok_and(|ip| ips.contains(&ip)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::reconcile::Report;
    use crate::status::Board;

    fn check(board: &Board) -> Result<(), String> {
        enforced(&board.observed(), 5, "mgy0123456789", &["10.1.2.3".parse().unwrap()])
    }

    fn failing(object: &str) -> Result<Report, ReconcileError> {
        Ok(Report { operations: 0, errors: vec![ReconcileError::new(object, "EPERM")] })
    }

    #[test]
    fn it_waits_for_policy_and_routes_but_not_for_the_datapath() {
        let board = Board::new(&["policy", "wireguard", "routes"]);
        assert_eq!(check(&board).unwrap_err(), "policy: pending");
        board.passed("policy", 5, &Ok(Report::default()));
        board.passed("routes", 4, &Ok(Report::default()));
        assert_eq!(check(&board).unwrap_err(), "routes: pending");
        board.passed("routes", 6, &Ok(Report::default()));
        assert_eq!(check(&board), Ok(()));
    }

    #[test]
    fn only_trouble_of_its_own_holds_it_up() {
        let board = Board::new(&["policy", "routes"]);
        board.passed("policy", 5, &failing("link mgyffffffffff"));
        board.passed("routes", 5, &failing("route 10.9.0.0/16 dev margay0 table 4207"));
        assert_eq!(check(&board), Ok(()));
        for object in ["route 10.1.2.3/32 dev mgy0123456789 table 4207", "neighbour 10.1.2.3"] {
            board.passed("routes", 5, &failing(object));
            assert!(check(&board).unwrap_err().starts_with("routes: "), "{object}");
        }
        board.passed("routes", 5, &Err(ReconcileError::new("links", "ENOBUFS")));
        assert_eq!(check(&board).unwrap_err(), "routes: links: ENOBUFS");
    }

    #[test]
    fn policy_that_could_not_be_written_holds_everyone_up() {
        let board = Board::new(&["policy"]);
        board.passed("policy", 5, &failing("policy maps"));
        assert_eq!(check(&board).unwrap_err(), "policy: policy maps: EPERM");
        assert!(check(&Board::new(&[])).is_err(), "no policy is not an open policy");
    }
}
