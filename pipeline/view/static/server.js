// What the server of this page answers. All addresses are relative: the page's own begins with the token.

/** Fetch JSON; an answer that is none is an Error with the server's words. */
export async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: has nested-ats view been ended?");
  }
  if (!response.ok) throw new Error(await reason(response));
  return response.json();
}

/** Why an answer is none, in words. */
export async function reason(response) {
  try {
    return (await response.json()).error;
  } catch {
    return `The server answers ${response.status}.`;
  }
}

/** Call a function once its calls have stopped for some milliseconds. */
export function settled(call, milliseconds) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), milliseconds);
  };
}

/** Make an element with properties and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A number in three digits, and in all that it has before the point. */
export function short(value) {
  return Math.abs(value) >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}
