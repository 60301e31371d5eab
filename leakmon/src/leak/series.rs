//! The past of one wait: how many tasks were in it at each census, and how
//! many of them had stayed since the one before.

use std::collections::VecDeque;
use std::time::Duration;

/// Samples of each window.
const WINDOW: usize = 32;

/// Growth below this many tasks is noise.
const LEAST_GROWTH: u64 = 3;

/// One census. There are thousands of waits with 64 of them each.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at_milliseconds: u64,
    count: u32,
    held: u32,
}

impl Sample {
    /// `held` of the `count` tasks in the wait have not run since an earlier census.
    fn new(at: Duration, count: u64, held: u64) -> Sample {
        let few = |tasks: u64| u32::try_from(tasks).unwrap_or(u32::MAX);
        Sample {
            at_milliseconds: u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
            count: few(count),
            held: few(held),
        }
    }

    fn at(self) -> Duration {
        Duration::from_millis(self.at_milliseconds)
    }

    fn count(self) -> u64 {
        u64::from(self.count)
    }

    fn held(self) -> u64 {
        u64::from(self.held)
    }
}

/// Tasks in a wait that stay there become more.
pub(super) struct Growth {
    /// When it began.
    pub(super) since: Duration,
    /// Tasks in the wait then.
    pub(super) from: u64,
}

/// The past of one wait, in bounded memory.
///
/// It *grows* when the tasks held (those that have not run since an earlier
/// census) become more, over the last [`WINDOW`] censuses or, for slow leaks,
/// over all of them at a coarser resolution, such that
/// - they are more than ever before the window, so that an old peak that
///   comes back is no growth;
/// - less than a tenth of what was gained was lost again, so that what swings
///   is no growth;
/// - the gain is at least 3 and exceeds the square root of where it began,
///   so that noise is none;
/// - it still goes on: the last gain is not older than four times the mean
///   time between gains, nor is the last third of the window flat.
///
/// It *moves* when a task that was in it at the last census has left or run.
#[derive(Debug)]
pub(super) struct Series {
    /// The last samples, all of them.
    recent: VecDeque<Sample>,
    /// Every sample since the first, thinned out by halves as it fills.
    long: Vec<Sample>,
    /// One sample in so many goes into `long`.
    stride: u32,
    /// Samples since the last that did.
    skipped: u32,
    /// Most held in samples that have left `recent`.
    peak: u64,
    /// The last sample, and the census it was taken in.
    last: Option<Sample>,
    seen: u64,
    /// Tasks in the wait at the sample before the last.
    before: u64,
    /// Last time that more were held than before.
    gained_at: Duration,
    /// Since when nothing has moved, and in how many samples at least two
    /// tasks were held since.
    still_since: Option<Duration>,
    still_samples: u32,
    /// The longest time that nothing moved before something did.
    longest_still: Duration,
    /// Times that a task went on, as the probes counted them so far, and of
    /// these in the last interval.
    resumes: u64,
    resumed: u64,
}

impl Series {
    /// Takes in what the probes counted, if there are any.
    pub(super) fn observe_resumes(&mut self, resumes: Option<u64>) {
        let resumes = resumes.unwrap_or(self.resumes);
        self.resumed = resumes.saturating_sub(self.resumes);
        self.resumes = resumes;
    }

    /// Times that a task went on in the last interval, as far as probes saw.
    pub(super) fn resumed(&self) -> u64 {
        self.resumed
    }

    pub(super) fn new() -> Series {
        Series {
            // All of it at once: what is watched for days takes no more than at
            // its start.
            recent: VecDeque::with_capacity(WINDOW),
            long: Vec::with_capacity(WINDOW),
            stride: 1,
            skipped: 0,
            peak: 0,
            resumes: 0,
            resumed: 0,
            last: None,
            seen: 0,
            before: 0,
            gained_at: Duration::ZERO,
            still_since: None,
            still_samples: 0,
            longest_still: Duration::ZERO,
        }
    }

    /// Number of the census in which a task was last seen here.
    pub(super) fn seen(&self) -> u64 {
        self.seen
    }

    /// Tasks that came since the census before.
    pub(super) fn newcomers(&self) -> u64 {
        self.last
            .map_or(0, |last| last.count().saturating_sub(self.before))
    }

    /// Takes in census number `census`.
    pub(super) fn observe(&mut self, census: u64, at: Duration, count: u64, held: u64) {
        self.seen = census;
        self.push(census, Sample::new(at, count, held));
    }

    /// Takes in a census in which nobody was here.
    pub(super) fn observe_none(&mut self, census: u64, at: Duration) {
        self.push(census, Sample::new(at, 0, 0));
    }

    fn push(&mut self, census: u64, sample: Sample) {
        self.before = 0;
        if let Some(last) = self.last {
            self.before = last.count();
            if sample.held() < last.count() {
                // Someone ran or left.
                if let Some(since) = self.still_since {
                    self.longest_still = self.longest_still.max(sample.at().saturating_sub(since));
                }
                self.still_since = (sample.count() > 0).then_some(sample.at());
                self.still_samples = 0;
            }
            if sample.held() > last.held() {
                self.gained_at = sample.at();
            }
        }
        if sample.count() > 0 && self.still_since.is_none() {
            self.still_since = Some(sample.at());
        }
        if sample.held() >= 2 {
            self.still_samples = self.still_samples.saturating_add(1);
        }
        self.last = Some(sample);
        // The first census cannot know who has not run: nobody is held in it.
        if census < 2 {
            return;
        }
        if self.recent.len() == WINDOW
            && let Some(gone) = self.recent.pop_front()
        {
            self.peak = self.peak.max(gone.held());
        }
        self.recent.push_back(sample);
        self.skipped += 1;
        if self.skipped >= self.stride || self.long.is_empty() {
            self.skipped = 0;
            if self.long.len() == WINDOW {
                let mut keep = false;
                self.long.retain(|_| {
                    keep = !keep;
                    keep
                });
                self.stride = self.stride.saturating_mul(2);
            }
            self.long.push(sample);
        }
    }

    /// Whether it grows, by at least `needed` samples.
    pub(super) fn growth(&self, needed: usize) -> Option<Growth> {
        let last = self.last?;
        let mut long = self.long.clone();
        if long.last().is_some_and(|sample| sample.at() < last.at()) {
            long.push(last);
        }
        // A slow leak only shows in the long window, and where both show it
        // the long one says for how long.
        if let Some(growth) = self.growth_in(&long, needed) {
            return Some(growth);
        }
        if self.peak >= last.held() {
            return None;
        }
        let recent: Vec<Sample> = self.recent.iter().copied().collect();
        self.growth_in(&recent, needed)
    }

    fn growth_in(&self, window: &[Sample], needed: usize) -> Option<Growth> {
        let (first, last) = (window.first()?, window.last()?);
        if window.len() < needed {
            return None;
        }
        let (mut gained, mut lost, mut gains) = (0u64, 0u64, 0u32);
        for pair in window.windows(2) {
            let (a, b) = (pair[0].held(), pair[1].held());
            gained += b.saturating_sub(a);
            lost += a.saturating_sub(b);
            gains += u32::from(b > a);
        }
        let growth = last.held().saturating_sub(first.held());
        let noise = (first.held() as f64).sqrt();
        // A single jump is not a growth.
        if growth < LEAST_GROWTH || (growth as f64) < noise || gains < 2 || lost * 10 > gained {
            return None;
        }

        // Where it was lowest last, the growth began.
        let lowest = window.iter().map(|sample| sample.held()).min()?;
        let start = window.iter().rev().find(|sample| sample.held() == lowest)?;
        let time = last.at().saturating_sub(start.at());
        if time.is_zero() {
            return None;
        }
        let step = time / u32::try_from(window.len() - 1).unwrap_or(u32::MAX).max(1);
        let patience = (time / gains * 4).max(step * 3);
        if last.at().saturating_sub(self.gained_at) > patience {
            return None;
        }
        let third = last.at().saturating_sub(time / 3);
        let then = window
            .iter()
            .rev()
            .find(|sample| sample.at() <= third)
            .unwrap_or(first);
        // A third of the time should bring a third of the growth: a quarter of that will do.
        if last.held().saturating_sub(then.held()) * 12 < last.held() - start.held() {
            return None;
        }
        Some(Growth {
            since: start.at(),
            from: start.count(),
        })
    }

    /// For how long at least `least` tasks have not moved: `None` when they
    /// have, or too lately, or when longer standstills have ended before.
    pub(super) fn stuck(&self, least: u64, patience: Duration) -> Option<Duration> {
        let last = self.last?;
        let still = last.at().saturating_sub(self.still_since?);
        let enough = last.held() >= least
            && self.still_samples >= 2
            && still >= patience
            && still > self.longest_still * 3;
        enough.then_some(still)
    }
}
