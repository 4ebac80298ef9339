//! Writing, with patience: what fails is tried again, later each time, and no two agents at the same time.

use std::time::Duration;

use kube::Error;
use tokio::time::timeout;

use super::client::{ANSWERED, chain};

/// After the first failure, and at most.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// A failed write: a word for programs and a sentence for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// Waits for the answer to a write, for so long as answers take.
pub(super) async fn answered<T>(write: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
    match timeout(ANSWERED, write).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => {
            let reason = match &error {
                Error::Api(status) => match status.code {
                    401 => "Unauthorized",
                    403 => "Forbidden",
                    404 => "NotFound",
                    409 => "Conflict",
                    _ => "RequestFailed",
                },
                Error::Auth(_) => "Unauthorized",
                _ => "Unreachable",
            };
            Err(Failure { reason, message: chain(&error) })
        }
        Err(_) => {
            let message = format!("no answer within {} s", ANSWERED.as_secs());
            Err(Failure { reason: "Unreachable", message })
        }
    }
}

/// How long to wait after so many writes in a row that did not help.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Pace(u32);

impl Pace {
    /// One more that did not help; the time until the next.
    pub(super) fn slower(&mut self, rng: &mut impl rand::Rng) -> Duration {
        let longest = (FIRST * 2u32.saturating_pow(self.0.min(10))).min(LONGEST);
        self.0 = self.0.saturating_add(1);
        longest.mul_f64(rng.random_range(0.5..1.0))
    }

    /// All is as it should be.
    pub(super) fn reset(&mut self) {
        self.0 = 0;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn each_wait_may_be_longer_up_to_a_limit_and_none_is_zero() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let mut pace = Pace::default();
        for round in 0..20 {
            let wait = pace.slower(&mut rng);
            let longest = (FIRST * 2u32.pow(round.min(6))).min(LONGEST);
            assert!(wait >= FIRST / 2 && wait <= longest, "{round}: {wait:?}");
        }
        pace.reset();
        assert!(pace.slower(&mut rng) <= FIRST);
    }
}
