// Vercel's AI SDK: the provider for OpenAI over responses (its default) and over chat completions, and the one for
// servers like this.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from 'ai';
import { check, collect, model, Place, question, url, Weather } from './shared.mjs';

const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: 'none' });
const compatible = createOpenAICompatible({
  baseURL: `${url}/v1`, name: 'pilotfish', apiKey: 'none', includeUsage: true, supportsStructuredOutputs: true,
});
const llms = {
  responses: openai(model), chat: openai.chat(model), completion: openai.completion(model), compatible: compatible(model),
};

for (const [name, llm] of Object.entries(llms)) {
  const asked = { model: llm, prompt: question, temperature: 0, maxRetries: 0, maxOutputTokens: 100 };

  test(`${name}: a text and its stream`, async () => {
    const whole = await generateText({ ...asked, system: 'Be brief.', maxOutputTokens: 24 });
    assert.ok(whole.text);
    assert.ok(whole.usage.outputTokens > 0);
    const stream = streamText({ ...asked, system: 'Be brief.', maxOutputTokens: 24, onError: ({ error }) => assert.fail(error) });
    assert.equal((await collect(stream.textStream)).join(''), whole.text);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
    assert.equal(await stream.finishReason, whole.finishReason);
  });
  if (name === 'completion') continue;

  test(`${name}: tools`, async () => {
    const places = [];
    const tools = {
      get_weather: tool({
        description: 'Look up the weather.',
        inputSchema: Place,
        execute: async (place) => {
          places.push(place);
          return { degrees: 3 };
        },
      }),
    };
    const forced = { ...asked, tools, toolChoice: 'required' };
    const whole = await generateText(forced);
    assert.equal(whole.finishReason, 'tool-calls');
    assert.ok(whole.toolCalls.length > 0);
    whole.toolCalls.forEach((call) => check(Place, call.input));
    const stream = streamText({ ...forced, onError: ({ error }) => assert.fail(error) });
    const parts = await collect(stream.fullStream);
    const calls = parts.filter((part) => part.type === 'tool-call');
    assert.deepEqual(calls.map((call) => call.input), whole.toolCalls.map((call) => call.input));
    assert.ok(parts.some((part) => part.type === 'tool-input-delta'));

    // the calls' results go back, and the model answers
    const before = places.length;
    const steps = await generateText({
      ...asked, tools, maxOutputTokens: 40, stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: 'tool', toolName: 'get_weather' } : 'none' }),
    });
    assert.equal(steps.steps.length, 2);
    assert.ok(places.length > before);
  });

  test(`${name}: objects`, async () => {
    const whole = await generateObject({ ...asked, schema: Weather });
    check(Weather, whole.object);
    const stream = streamObject({ ...asked, schema: Weather, onError: ({ error }) => assert.fail(error) });
    await collect(stream.partialObjectStream);
    assert.deepEqual(await stream.object, whole.object);
    const output = await generateText({ ...asked, output: Output.object({ schema: Weather }) });
    check(Weather, output.output);
  });
}

test('an array and an enumeration', async () => {
  const asked = { model: llms.responses, prompt: question, temperature: 0, maxRetries: 0, maxOutputTokens: 100 };
  const found = await generateObject({ ...asked, output: 'enum', enum: ['cold', 'warm'] });
  assert.ok(['cold', 'warm'].includes(found.object));
});
