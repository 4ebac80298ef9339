//! Waiting for a condition, never for a time.

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Polls until the condition gives a value; its last error is what a time-out reports.
pub fn until<T>(
    what: impl Display,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(5);
    loop {
        let last = condition();
        if let Ok(Some(value)) = last {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            match last {
                Err(error) => return Err(error.context(format!("waited {limit:?} for {what}"))),
                Ok(_) => bail!("waited {limit:?} for {what}"),
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
